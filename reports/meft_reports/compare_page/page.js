// The tables of differences, sorted and searched; without a script they are as they are.
const scheme = matchMedia('(prefers-color-scheme: dark)');
const followScheme = () => document.documentElement.classList.toggle('dark', scheme.matches);
scheme.addEventListener('change', followScheme);
followScheme();
const { jQuery } = await load('#datatables');
for (const table of document.querySelectorAll('table.changes')) {
  new jQuery.fn.dataTable(table, {
    order: [], pageLength: 25, lengthMenu: [25, 100, 500], autoWidth: false,
    layout: { topStart: null, topEnd: 'search', bottomStart: ['info', 'pageLength'], bottomEnd: { paging: { buttons: 5, type: 'simple_numbers' } } },
    language: { search: 'Search', info: '_START_ to _END_ of _TOTAL_', infoEmpty: 'None', infoFiltered: '(of _MAX_)', lengthMenu: '_MENU_ a page', zeroRecords: 'Nothing has this text.' },
  });
}
document.documentElement.classList.add('ready', 'complete');
