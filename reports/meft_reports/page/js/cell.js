// One cell in a dialog: how to run it again, and everything that is known about it.
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const commandOf = (cell) => `meft-bench run ${/^[\w.-]+$/.test(get('sweep', cell)) ? get('sweep', cell) : quoted(get('sweep', cell))} --only ${quoted(get('cell_id', cell))} --force`;
const copyButton = (label, text, source) => {
  const button = make('button', { type: 'button', textContent: label });
  button.onclick = async () => {
    try { await navigator.clipboard.writeText(text()); } catch {
      if (!source) { button.textContent = 'Not allowed by the browser'; return; }
      getSelection().selectAllChildren(source);
      if (!document.execCommand('copy')) { button.textContent = 'Selected: press Ctrl+C'; return; }
    }
    button.textContent = 'Copied';
  };
  return button;
};
const rowsOf = (title, names, cell) => {
  const present = names.filter((name) => known(get(name, cell)) && get(name, cell) !== '');
  if (!present.length) return [];
  return [make('h3', { textContent: title }), make('table', {}, ...present.map((name) => {
    const value = get(name, cell), exact = DATA.columns[name][1] == 'bytes' && !Array.isArray(value) ? ` (${value.toLocaleString('en')} bytes)` : '';
    const shownValue = Array.isArray(value) ? value.slice(0, 64).map((v) => (known(v) ? +(+v).toPrecision(4) : 'not finite')).join(', ') + (value.length > 64 ? `, ... (${value.length})` : '') : asText(name, value) + exact;
    return make('tr', { title: DATA.columns[name][3] }, make('td', { textContent: words(name) }), make('td', { textContent: shownValue }));
  }))];
};
const inSection = (section) => Object.keys(DATA.columns).filter((name) => DATA.columns[name][0] == section && name in CELLS);
const breakdownOf = (cell) => {
  const its = peakOf(cell);
  if (!its) return [];
  return [...storages(`What is alive at the peak${its.phase ? `, in ${its.phase}` : ''}: ${asBytes(its.peak)}`, its.rows),
    ...storages('What is saved for backward', its.saved)];
};
const storages = (title, rows) => (!rows.length ? [] : [make('h3', { textContent: title }),
  make('div', { className: 'wide' }, make('table', { className: 'storages' }, make('tr', {}, ...['bytes', 'kind', 'made in', 'module', 'operator', 'dtype and shape'].map((text) => make('th', { textContent: text }))),
    ...rows.map((row) => make('tr', {}, ...[`${asBytes(row[6])}${row[7] > 1 ? ` in ${row[7]}` : ''}`, row[0], row[1], row[2], row[3], row[4] ? `${row[4]} [${row[5].join(', ')}]` : ''].map((text) => make('td', { textContent: text }))))))]);
const siblingsOf = (cell) => {
  const its = SETTINGS.find((setting) => setting.cells.includes(cell));
  if (!its || its.cells.length < 2) return [];
  return [make('p', {}, 'Same setting: ', ...its.cells.flatMap((other) => [make('button', { type: 'button', className: 'link', textContent: `seed ${get('seed', other)}`, disabled: other == cell, onclick: () => openCell(other) }), ' ']))];
};
let cameFrom = null, addressBefore = '';
const openCell = (cell) => {
  const dialog = $('#cell'), id = get('cell_id', cell), command = make('pre', { id: 'command', textContent: commandOf(cell) });
  if (!dialog.open) { cameFrom = document.activeElement; addressBefore = location.hash.startsWith('#cell=') ? '' : location.hash; }
  const versions = JSON.parse(get('versions', cell) ?? '{}');
  const title = make('h2', { id: 'cell-title', tabIndex: -1, textContent: `${get('method', cell)} · ${WORKLOADS.length ? get('backbone', cell) : ''}` });
  const loss = make('div', { className: 'drawing' });
  dialog.replaceChildren(
    make('button', { type: 'button', className: 'close', textContent: 'Close', onclick: () => dialog.close() }), title,
    make('p', {}, make('span', { className: 'tag', textContent: get('status', cell) }), ' ', make('span', { className: 'tag', textContent: get('source', cell) }), ' ', make('code', { textContent: id })),
    ...siblingsOf(cell),
    make('h3', { textContent: 'Run it again' }), command, copyButton('Copy the command', () => commandOf(cell), command), ' ',
    copyButton('Copy a link to this cell', () => location.href, null),
    ...(get('message', cell) ? [make('h3', { textContent: 'Message' }), make('pre', { textContent: get('message', cell) })] : []),
    ...(get('log_tail', cell) ? [make('h3', { textContent: 'Last lines of its log' }), make('pre', { textContent: get('log_tail', cell) })] : []),
    ...rowsOf('Measurements', [...inSection('measurement'), ...inSection('derived').filter((name) => !['source', 'versions', 'newest_code'].includes(name))], cell),
    ...breakdownOf(cell), loss,
    ...rowsOf('Settings', inSection('cell'), cell), ...rowsOf('Environment', inSection('environment'), cell),
    make('h3', { textContent: 'Versions' }), make('p', { textContent: Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(', ') || '–' }),
  );
  history.replaceState(null, '', `#cell=${encodeURIComponent(id)}`);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  title.focus();
  const curve = get('loss_curve', cell);
  if (curve?.length > 2) embed(loss, { width: Math.min(520, dialog.clientWidth - 90), height: 120, config: THEME, title: { text: 'Training loss', color: 'var(--fg)' }, data: { values: curve.map((y, x) => ({ x: x + 1, y })) }, mark: 'line', encoding: { x: { field: 'x', type: 'quantitative', title: 'step' }, y: { field: 'y', type: 'quantitative', title: null, scale: { zero: false } } } }, { actions: false, renderer: 'svg' });
};
$('#cell').addEventListener('close', () => {
  if ($('#cell').open) return; // It was opened again meanwhile.
  history.replaceState(null, '', addressBefore || location.pathname + location.search);
  // The browser gives the focus back; but a figure that was drawn again has other marks.
  if (cameFrom && !cameFrom.isConnected) document.getElementById(cameFrom.id)?.focus();
});
const openFromAddress = () => {
  if (!location.hash.startsWith('#cell=')) return;
  const id = decodeURIComponent(location.hash.slice(6));
  for (let cell = 0; cell < DATA.cells.rows; cell++) if (get('cell_id', cell) === id) { openCell(cell); return; }
  say('No cell of this page has the name in the address.');
};
