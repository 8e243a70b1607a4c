// Figures: a specification is filled in, drawn as vectors, labelled, and put in words.
const THEME = {
  background: null, font: 'system-ui, sans-serif', view: { stroke: null },
  axis: { labelColor: 'var(--fg)', titleColor: 'var(--fg)', gridColor: 'var(--line)', domainColor: 'var(--soft)', tickColor: 'var(--soft)', labelFontSize: 11, titleFontSize: 12, titleFontWeight: 'normal' },
  point: { opacity: 1 },
  legend: { symbolOpacity: 1, labelColor: 'var(--fg)', titleColor: 'var(--fg)', labelFontSize: 11.5, labelLimit: 220, symbolLimit: 60 },
  header: { labelColor: 'var(--fg)', titleColor: 'var(--fg)', labelLimit: 400 },
  text: { color: 'var(--fg)', fontSize: 11 }, rule: { color: 'var(--soft)' },
};
let embed = null;
const fill = (value, terms) => {
  if (Array.isArray(value)) return value.map((each) => fill(each, terms));
  if (value && typeof value == 'object') {
    const entries = Object.entries(value).map(([key, each]) => [key, fill(each, terms)]);
    return Object.fromEntries(entries.filter(([, each]) => each !== undefined));
  }
  if (typeof value != 'string') return value;
  const whole = /^@(\w+)$/.exec(value);
  if (whole) return terms[whole[1]];
  return value.replace(/@(\w+)/g, (_, term) => terms[term] ?? '');
};
const withData = (spec, rows) => {
  const inner = spec.spec ?? spec;
  inner.layer = inner.layer?.filter(({ needs }) => !needs || rows.some((row) => known(row[needs])));
  inner.layer?.forEach((layer) => delete layer.needs);
  // What no row knows has no line in the tooltip.
  for (const { encoding } of [inner, ...(inner.layer ?? [])]) {
    if (encoding?.tooltip) encoding.tooltip = encoding.tooltip.filter(({ field }) => rows.some((row) => known(row[field])));
  }
  if (!inner.layer) delete inner.layer;
  return spec;
};
const columnsThatFit = (count) => Math.max(1, Math.min(count, 4, Math.floor((document.body.clientWidth - 60) / 300)));
const termsFor = (figure, made, width) => {
  const methods = DATA.looks.map((look) => look.name).filter((name) => made.rows.some((row) => row.method == name));
  const looks = methods.map((name) => LOOKS.get(name)), phone = width < 520;
  const longest = Math.max(0, ...made.rows.map((row) => (row.workload ?? row.name ?? '').length)) * 6.4 + 8;
  const label = made.words?.label ?? Math.min(longest, width * (phone ? 0.36 : 0.4));
  const columns = made.words?.columns ?? 1, panel = Math.max(120, Math.floor((width - 80) / columns) - 45);
  const terms = {
    width: Math.max(150, width - 70), height: phone ? 260 : 320, panel_width: panel, panel_height: phone ? 220 : 280,
    panel_beside_names: Math.max(70, Math.floor((width - label) / columns - 130)),
    width_beside_names: Math.max(100, width - label - (['memory', 'kinds'].includes(figure.name) ? 150 : 40)),
    label_width: label, legend_columns: Math.max(1, Math.floor((width - (JSON.stringify(figure.spec).includes('_beside_names') ? label : 0)) / 175)), ticks: phone ? 4 : 7, direction: phone ? 'vertical' : 'horizontal', x_type: 'quantitative',
    methods, colors: looks.map((l) => l.color), shapes: looks.map((l) => l.shape), dashes: looks.map((l) => l.dash), ...made.words,
  };
  const sizes = Object.values(figure.scaled), most = Math.max(1, ...made.rows.flatMap((row) => sizes.map((name) => row[name] ?? 0)));
  const [unit, size] = unitFor(most);
  if (sizes.length) terms.unit = unit;
  const rows = made.rows.map((row) => ({ ...row, ...Object.fromEntries(Object.entries(figure.scaled).map(([name, from]) => [name, known(row[from]) ? row[from] / size : null])) }));
  return [terms, rows];
};
// Labels never overlap: each takes the first of four places that is free, or none.
const PLACES = [[9, -8, 'left'], [-9, -8, 'right'], [9, 14, 'left'], [-9, 14, 'right']];
const collect = (item, test, found = []) => {
  if (item.marktype && test(item)) found.push(...item.items);
  for (const child of item.items ?? []) collect(child, test, found);
  return found;
};
const placeLabels = async (view, rows) => {
  const root = view.scenegraph().root, width = view.width(), height = view.height();
  const points = collect(root, (mark) => mark.marktype == 'symbol' && mark.items[0]?.cursor == 'pointer').map((item) => ({ x1: item.x - 6, x2: item.x + 6, y1: item.y - 6, y2: item.y + 6 }));
  const taken = [...points], kept = [];
  for (const item of collect(root, (mark) => mark.name?.startsWith('labels'))) {
    const wide = item.bounds.width(), high = item.bounds.height();
    for (const [dx, dy, align] of PLACES) {
      const box = { x1: align == 'left' ? item.x + dx : item.x + dx - wide, y1: item.y + dy - high, y2: item.y + dy + 2 };
      box.x2 = box.x1 + wide;
      if (box.x1 < 0 || box.x2 > width || box.y1 < 0 || box.y2 > height) continue;
      if (taken.some((t) => t.x1 < box.x2 && box.x1 < t.x2 && t.y1 < box.y2 && box.y1 < t.y2)) continue;
      taken.push(box);
      // Without the symbol by which Vega knows a row, or it would be the row that is removed.
      kept.push({ ...Object.fromEntries(Object.entries(rows.find((row) => row.name == item.datum.name))), dx, dy, align });
      break;
    }
  }
  await view.data('labels', kept).runAsync();
};
const inWords = (figure, rows) => {
  const values = rows.filter((row) => known(row[figure.value]));
  if (!values.length) return `${rows.length} marks.`;
  const least = values.reduce((a, b) => (b[figure.value] < a[figure.value] ? b : a)), most = values.reduce((a, b) => (b[figure.value] > a[figure.value] ? b : a));
  const text = (row) => `${row.line ?? row.name}${row.workload ? ` on ${row.workload}` : ''} (${row.value_text ?? row.relative_text ?? row.text ?? asText('', row[figure.value])})`;
  const score = (row) => `${row.name} (${row[figure.value].toFixed(3)})`;
  const one = ['scores', 'differences'].includes(figure.name) ? score : figure.name == 'matrix' ? (row) => `${row.method} on ${row.workload} (${row.relative_text})` : text;
  return least === most ? `One value: ${one(least)}.` : `Lowest: ${one(least)}. Highest: ${one(most)}.`;
};
const saveVector = (section, name) => {
  const svg = section.querySelector('svg').cloneNode(true), style = getComputedStyle(document.documentElement);
  svg.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  for (const mark of svg.querySelectorAll('[tabindex]')) mark.removeAttribute('tabindex');
  save(`${name}.svg`, 'image/svg+xml', svg.outerHTML.replace(/var\((--[\w-]+)\)/g, (_, variable) => style.getPropertyValue(variable).trim()));
};
const drawOne = async (figure) => {
  const made = MAKE[figure.rows]();
  let section = $(`#figure-${figure.name}`);
  if (!made.rows.length) { section?.remove(); return null; }
  if (!section) {
    section = make('section', { id: `figure-${figure.name}`, className: figure.is_wide ? 'whole' : '' },
      make('h2'), make('p', { className: 'place' }), make('p', { className: 'about' }), make('div', { className: 'tools' }), make('div', { className: 'drawing' }), make('p', { className: 'said' }));
    const before = DATA.figures.slice(DATA.figures.indexOf(figure) + 1).map((next) => $(`#figure-${next.name}`)).find(Boolean);
    $('#figures').insertBefore(section, before ?? null);
  }
  section.classList.toggle('whole', figure.is_wide || (made.words?.columns ?? 1) > 1);
  const [terms, rows] = termsFor(figure, made, section.clientWidth);
  const title = fill(figure.title, terms), place = chosenText(made.free ?? figure.free);
  $('h2', section).textContent = title[0].toUpperCase() + title.slice(1);
  $('.place', section).textContent = place;
  $('.about', section).textContent = figure.about;
  const words = [inWords(figure, rows), ...(made.notes ?? []).filter(Boolean)].join(' ');
  $('.said', section).textContent = words;
  $('.tools', section).replaceChildren(...tools(figure, section));
  const spec = withData(fill(figure.spec, terms), rows);
  spec.data = { values: rows };
  if (made.labels) {
    spec.datasets = { labels: made.labels.map((label) => ({ ...rows.find((row) => row.name == label.name), dx: 9, dy: -8, align: 'left' })) };
    const layer = spec.layer.find((each) => each.name == 'labels');
    for (const name of ['dx', 'dy', 'align']) layer.mark[name] = { expr: `datum.${name}` };
  }
  const box = make('div', { className: 'marks' });
  $('.drawing', section).replaceChildren(box);
  const { view } = await embed(box, { ...spec, description: `${title}. ${words}`, config: THEME, autosize: { type: 'pad' } }, { actions: false, renderer: 'svg', tooltip: { theme: 'custom' } });
  if (made.labels) await placeLabels(view, spec.datasets.labels);
  openByKeys(figure, box);
  view.addEventListener('click', (_, item) => { if (known(item?.datum?.cell)) openCell(item.datum.cell); });
  return view;
};
const CONTROL_WORDS = { against: 'compared with', x: 'along', y: 'number', y_bytes: 'number', panel: 'panels by', scale: 'scales', by_block: 'number', labels: 'labels' };
const OPTIONS = {
  against: () => DATA.looks.map((look) => look.name),
  x: curveAxes, y: () => numberNames(), y_bytes: () => numberNames((name) => name.endsWith('_bytes')),
  panel: () => ['none', ...panelFields().filter((name) => name != STATE.x)], scale: () => ['linear', 'log'],
  by_block: blockColumns, labels: () => ['some', 'all'],
};
const tools = (figure, section) => [
  ...figure.controls.map((name) => {
    const values = OPTIONS[name]();
    if (!values.includes(STATE[name])) STATE[name] = values[0];
    const label = selector(name, CONTROL_WORDS[name], values, () => { toAddress(); redraw(figure.controls.includes('against') ? null : figure); }, (_, value) => words(value));
    const select = $('select', label);
    select.id = `${figure.name}-${name}`;
    return label;
  }),
  make('button', { type: 'button', className: 'link', textContent: 'Save as SVG', onclick: () => saveVector(section, figure.name) }),
];
let drawing = Promise.resolve();
const redraw = (only = null) => {
  const focused = document.activeElement?.id;
  drawing = drawing.then(async () => {
    for (const figure of only ? [only] : DATA.figures) await drawOne(figure);
    if (focused) document.getElementById(focused)?.focus();
  });
  return drawing;
};
