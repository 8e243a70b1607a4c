// The order of things: figures first, then the table, then the cell of the address.
const hasScores = SETTINGS.some((s) => s.is_trained && known(s.score));
const GB = ['peak_activation_bytes', 'peak_allocated_bytes', 'saved_bytes'].find((name) => SETTINGS.some((s) => known(s[name])));
Object.assign(STATE, { against: DATA.against, x: '', y: hasScores ? 'score' : GB ?? numberNames()[0], y_bytes: GB, panel: 'none', scale: 'linear', by_block: '', labels: 'some' });
fromAddress();
if (!curveAxes().length && GB) STATE.y = GB;
const scheme = matchMedia('(prefers-color-scheme: dark)');
const followScheme = () => document.documentElement.classList.toggle('dark', scheme.matches);
scheme.addEventListener('change', followScheme);
followScheme();
const chooseAgain = () => { toAddress(); redraw(); };
showChoice(chooseAgain);
document.documentElement.classList.add('ready');
embed = (await load('#vega')).default;
await redraw();
for (const button of document.querySelectorAll('[data-open]')) button.onclick = () => openCell(Number(button.dataset.open));
const library = await load('#datatables');
showTable(library);
openFromAddress();
addEventListener('hashchange', openFromAddress);
let width = document.body.clientWidth, waiting = 0;
addEventListener('resize', () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { if (document.body.clientWidth != width) { width = document.body.clientWidth; redraw(); } }, 200);
});
// For a console, and for tests.
Object.assign(window, { pageDrawn: () => drawing, pageCell: get, pageRecords: allRecords, jQueryOfPage: library.jQuery });
document.documentElement.classList.add('complete');
