// What the reader chose: one value for each field in which the workloads differ.
// The choice is in the address of the page, so that a link shows the same figures.
const FIELDS = DATA.fields.filter((field) => unique(WORKLOADS.map((w) => String(w[field]))).length > 1);
const COUNTS = new Map();
for (const setting of SETTINGS) {
  const weight = known(setting.peak_allocated_bytes) || known(setting.score) ? 1 : 0.1;
  COUNTS.set(setting.w, (COUNTS.get(setting.w) ?? 0) + weight);
}
const LABELS = { seq_len: 'tokens', batch_size: 'batch', place: 'code and machine' };
const shown = (field, value) => {
  const text = String(value).replace(/^random:/, '').replace(/^virtual-/, 'virtual ');
  return field == 'depth' && text == '0' ? "the backbone's own" : text;
};
const STATE = {};
const fromAddress = () => {
  const given = new URLSearchParams(location.hash.slice(1));
  const start = WORKLOADS[DATA.opening];
  for (const field of FIELDS) STATE[field] = given.get(field) ?? String(start[field]);
  for (const name of ['against', 'x', 'y', 'panel', 'scale', 'by_block', 'labels']) {
    if (given.has(name)) STATE[name] = given.get(name);
  }
  nearest(null);
};
const toAddress = () => {
  if (location.hash.startsWith('#cell=')) return;
  history.replaceState(null, '', `#${new URLSearchParams(STATE)}`);
};
// No choice is empty: the other selectors move to the nearest workload that has cells.
const nearest = (fixed) => {
  let best = null, most = -1;
  WORKLOADS.forEach((workload, index) => {
    if (fixed && String(workload[fixed]) !== STATE[fixed]) return;
    const same = FIELDS.filter((field) => String(workload[field]) === STATE[field]).length;
    const rank = same * 1e6 + (COUNTS.get(index) ?? 0);
    if (rank > most) [best, most] = [workload, rank];
  });
  if (best) for (const field of FIELDS) STATE[field] = String(best[field]);
};
const isChosen = (workload, free = []) =>
  FIELDS.every((field) => free.includes(field) || String(workload[field]) === STATE[field]);
const chosen = (free = []) => {
  const these = new Set(WORKLOADS.flatMap((w, index) => (isChosen(w, free) ? [index] : [])));
  return SETTINGS.filter((setting) => these.has(setting.w));
};
const chosenText = (free = []) => FIELDS.filter((field) => !free.includes(field)).map((field) =>
  ({ batch_size: `batch ${STATE[field]}`, seq_len: `${STATE[field]} tokens`, depth: STATE[field] == '0' ? 'own depth' : `${STATE[field]} blocks`, weights_dtype: `${STATE[field]} weights`, attention: `${STATE[field]} attention` })[field] ?? shown(field, STATE[field])).join(' · ');
const selector = (name, label, values, changed, words = shown) => {
  const select = make('select', { id: `choose-${name}` }, ...values.map((value) =>
    make('option', { value, textContent: words(name, value) })));
  select.value = STATE[name];
  select.onchange = () => { STATE[name] = select.value; changed(); };
  return make('label', { className: 'pick' }, label, select);
};
const byNumber = (a, b) => (a - b) || (isNaN(a - b) ? String(a).localeCompare(String(b), 'en') : 0);
const showChoice = (changed) => {
  $('#choice').replaceChildren(...FIELDS.map((field) => selector(
    field, LABELS[field] ?? words(field),
    unique(WORKLOADS.map((w) => String(w[field]))).sort(byNumber),
    () => { nearest(field); showChoice(changed); $(`#choose-${field}`).focus(); changed(); })));
};
