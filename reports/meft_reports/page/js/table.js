// The table of all cells: sorted, searched, filtered, with chosen columns, as CSV.
const FIRST = ['method', 'status', 'task', 'backbone', 'depth', 'dtype', 'weights_dtype', 'batch_size', 'seq_len', 'device', 'attention', 'learning_rate', 'scored_on', 'seed', 'score', 'peak_allocated_bytes', 'peak_activation_bytes', 'saved_bytes', 'step_seconds', 'step_ratio'];
const FILTERED = ['status', 'method', 'task', 'backbone', 'dtype', 'device', 'attention', 'sweep'];
const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const isList = (name) => DATA.columns[name][2] == 'list';
const isNumber = (name) => ['Int64', 'Float64'].includes(DATA.columns[name][2]);
const varies = (name) => {
  const column = CELLS[name];
  if (!column || isList(name)) return false;
  return column.values ? unique(column.values).length > 1 : column.words.length > 1 || column.at.includes(null);
};
const forSpreadsheet = (text) => (/^\s*[=+\-@'＝＋－＠\t\r]/u.test(text) ? `'${text}` : text);
const FILTERS = {};
const passes = (cell) => Object.entries(FILTERS).every(([name, wanted]) => (wanted instanceof Set ? wanted.has(cell) : wanted === '' || get(name, cell) === wanted));
const recordOf = (cell) => {
  const record = { schema_version: DATA.schema_version, cell: {}, measurement: {}, environment: {} };
  for (const [name, [section]] of Object.entries(DATA.columns)) {
    if (section == 'derived') continue;
    const value = get(name, cell);
    if (section == '') { if (known(value)) record[name] = value; } else record[section][name] = value;
  }
  record.message ??= '';
  record.environment.versions = JSON.parse(get('versions', cell) ?? '{}');
  return record;
};
const allRecords = () => Array.from({ length: DATA.cells.rows }, (_, cell) => `${JSON.stringify(recordOf(cell))}\n`).join('');
const showTable = ({ jQuery }) => {
  const names = [...FIRST.filter((name) => name == 'method' || varies(name)), ...Object.keys(DATA.columns).filter((name) => !FIRST.includes(name) && varies(name) && !['versions', 'started_at', 'newest_code', 'log_tail', 'sweep_caveats'].includes(name))];
  const numFirst = names.filter((name) => FIRST.includes(name)).length;
  const column = (name, index) => ({
    title: escaped(words(name)), data: null, defaultContent: '', visible: index < numFirst,
    className: isNumber(name) ? 'number' : 'text', type: isNumber(name) ? 'num' : 'string',
    render: (_, use, cell) => {
      const value = get(name, cell);
      if (use == 'display') {
        const text = escaped(name == 'cell_id' || name == 'message' ? asText(name, value).slice(0, 120) : asText(name, value));
        return index ? text : `<button type="button" class="link" data-cell="${cell}">${text}</button>`;
      }
      if (use == 'export') return known(value) ? (typeof value == 'string' ? forSpreadsheet(value) : String(value)) : '';
      // DataTables decodes it as markup.
      if (use == 'filter') return escaped(asText(name, value));
      return value ?? (isNumber(name) ? -Infinity : '');
    },
  });
  jQuery.fn.dataTable.ext.search.push((settings, _, __, cell) => settings.nTable.id != 'cells' || passes(cell));
  const table = new jQuery.fn.dataTable($('#cells'), {
    data: Array.from({ length: DATA.cells.rows }, (_, cell) => cell), columns: names.map(column),
    deferRender: true, pageLength: 15, lengthMenu: [15, 50, 200], autoWidth: false, order: [],
    layout: { topStart: { buttons: [{ extend: 'colvis', text: 'Columns', fade: 0 }, { extend: 'csvHtml5', text: 'CSV', filename: 'cells', title: null, exportOptions: { columns: ':visible', orthogonal: 'export', stripHtml: false, decodeEntities: false, stripNewlines: false, trim: false } },
      { text: 'Records', action: () => save('cells.jsonl', 'application/jsonl', allRecords()) }] }, topEnd: 'search', bottomStart: ['info', 'pageLength'], bottomEnd: { paging: { buttons: 5, type: 'simple_numbers' } } },
    language: { search: 'Search', info: '_START_ to _END_ of _TOTAL_ cells', infoEmpty: 'No cells', infoFiltered: '(of _MAX_)', lengthMenu: '_MENU_ a page', zeroRecords: 'No cell passes the filters.' },
  });
  jQuery('#cells tbody').on('click', 'tr', function () {
    const cell = jQuery('#cells').DataTable().row(this).data();
    if (known(cell)) { this.querySelector('button')?.focus({ preventScroll: true }); openCell(cell); }
  });
  // A list that closes takes the focus with it; it goes back to the button that opened it.
  jQuery('body').on('buttons-popover-hide.dt', () => { if (document.activeElement == document.body) $('.buttons-colvis').focus(); });
  const redrawTable = () => jQuery('#cells').DataTable().draw();
  const clear = make('button', { type: 'button', className: 'link', textContent: 'Show all cells', hidden: true });
  const changed = () => { clear.hidden = !Object.values(FILTERS).some((wanted) => wanted !== ''); redrawTable(); };
  const selects = FILTERED.filter((name) => CELLS[name]?.words?.length > 1).map((name) => {
    const select = make('select', { id: `filter-${name}` }, make('option', { value: '', textContent: 'all' }), ...CELLS[name].words.map((value) => make('option', { value, textContent: shown(name, value) })));
    select.onchange = () => { FILTERS[name] = select.value; changed(); };
    return make('label', { className: 'pick' }, words(name), select);
  });
  clear.onclick = () => {
    for (const name of Object.keys(FILTERS)) delete FILTERS[name];
    for (const label of selects) $('select', label).value = '';
    changed();
  };
  $('#filters').replaceChildren(...selects, clear);
  for (const button of document.querySelectorAll('[data-caveat]')) {
    button.onclick = () => {
      FILTERS.caveat = new Set(DATA.caveats[button.dataset.caveat]);
      changed();
      $('#cells-section').scrollIntoView();
      $('#cells-section').focus({ preventScroll: true });
    };
  }
  return table;
};
