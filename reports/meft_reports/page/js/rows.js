// Rows of each kind of figure, made of the settings that the reader chose.
// A function returns { rows, words, notes }: `words` fill in the specification.
const ERRORS = ['gradient_error', 'reconstruction_error', 'start_deviation'];
const BY_BLOCK = ['gradient_error', 'reconstruction_error', 'union_fraction', 'routing_recall',
  'h2d_forward_bytes', 'h2d_backward_bytes', 'h2d_update_bytes', 'd2h_forward_bytes', 'd2h_backward_bytes', 'd2h_update_bytes'];
const PARTS = ['h2d_forward_bytes', 'h2d_backward_bytes', 'h2d_update_bytes', 'd2h_forward_bytes', 'd2h_backward_bytes', 'd2h_update_bytes'];
const PART_WORDS = { h2d: 'to the device', d2h: 'to the host', forward: 'forward', backward: 'backward', update: 'update' };
// Kinds of memory, in the order of their colors: what rests between steps comes first.
const KINDS = ['frozen', 'parameters', 'optimizer', 'gradients', 'saved', 'buffers', 'recompute', 'backward', 'workspace', 'update', 'forward', 'inputs', 'libraries', 'unattributed', 'smaller storages'];
const zeroNote = (rows, positive) => rows.some((row) => row.is_zero) && (positive.length ? 'Values on the lower edge are exactly 0.' : 'All values are exactly 0.');
const kindColor = (kind) => `var(--k${KINDS.includes(kind) ? KINDS.indexOf(kind) : 11})`;
const byKind = (a, b) => (KINDS.includes(a) ? KINDS.indexOf(a) : 99) - (KINDS.includes(b) ? KINDS.indexOf(b) : 99) || byNumber(a, b);
const inWorkload = (rows) => {
  // Names in a figure of one workload: options only where a method has several settings.
  const several = new Map();
  for (const row of rows) several.set(row.method, (several.get(row.method) ?? 0) + 1);
  return rows.map((row) => ({ ...row, name: several.get(row.method) > 1 ? row.name : row.method }));
};
const didNotFit = (rows) => {
  const texts = rows.filter((row) => row.status == 'oom').map((row) => `${row.name} (${row.text})`);
  return texts.length ? `Did not fit: ${texts.slice(0, 12).join(', ')}${texts.length > 12 ? ', ...' : ''}.` : '';
};
// What `column` says in a list of lists, such as errors; null for what is not finite.
const spread = (setting, column) => (column == 'union_fraction' && setting.is_assumed ? null : get(column, setting.cells.find((cell) => get('status', cell) == 'ok') ?? setting.cell));

const MAKE = {
  longest() {
    const rows = decode(DATA.searches), panels = unique(rows.map((row) => row.panel)), whats = unique(rows.map((row) => row.what));
    const columns = document.body.clientWidth < 1000 ? 1 : Math.min(2, panels.length);
    return { rows, words: { what: whats.join(' and '), x: unique(rows.map((row) => row.unit)).join(', '), panels, columns }, notes: ['Predicted, not measured.'], free: FIELDS };
  },
  scores() {
    const all = inWorkload(chosen().filter((s) => known(s.score) || s.status == 'oom'));
    const rows = all.filter((s) => s.is_trained && known(s.score) && known(s.peak_allocated_bytes));
    const best = new Map();
    for (const row of rows) if (!best.has(row.method) || best.get(row.method).score < row.score) best.set(row.method, row);
    const rank = (row) => (row.is_front ? 0 : best.get(row.method) === row ? 1 : 2);
    const start = all.find((s) => s.is_start), majority = rows[0]?.majority_score;
    const notes = [known(majority) && `Most frequent answer: ${majority.toFixed(3)}.`,
      start && `Before training: ${start.score.toFixed(3)}.`, didNotFit(all)];
    const labels = rows.slice().sort((a, b) => rank(a) - rank(b) || b.score - a.score);
    return { rows, labels: labels.filter((row) => STATE.labels == 'all' || rank(row) < 2), notes };
  },
  pairs() {
    const these = new Set(chosen().map((s) => s.w));
    const all = PAIRS.filter((pair) => these.has(pair.w));
    const others = unique(all.map((pair) => pair.against));
    const against = others.includes(STATE.against) ? STATE.against
      : all.find((pair) => pair.against_method == STATE.against)?.against ?? others[0];
    const rows = all.filter((pair) => pair.against == against).map((pair) => ({ ...pair, order: -pair.difference }));
    return { rows, words: { against }, notes: [against && `Compared with ${against}.`] };
  },
  memory() {
    const rows = inWorkload(chosen().filter((s) => !s.is_start && !s.is_answer && !s.is_trial && (known(s.peak_allocated_bytes) || s.status == 'oom')))
      .sort((a, b) => a.order - b.order).slice(0, 40);
    return { rows, notes: [rows.some((s) => s.is_predicted) && 'Predicted, not measured.', rows.some((s) => s.is_assumed) && 'Where the name says so, the share of active neurons is assumed.'] };
  },
  kinds() {
    const rows = [], settings = inWorkload(chosen().filter((s) => !s.is_trial));
    for (const setting of settings) {
      const cell = setting.cells.find(peakOf);
      if (cell === undefined) continue;
      const its = peakOf(cell);
      for (const [kind, bytes] of Object.entries(its.kinds)) rows.push({ name: setting.name, method: setting.method, cell, kind, bytes, total: its.peak, value_text: asBytes(its.peak), share: bytes / its.peak, phase: its.phase || 'no phase', order: its.peak, peak_text: `${asBytes(its.peak)}${its.phase ? `, in ${its.phase}` : ''}` });
    }
    const kinds = unique(rows.map((row) => row.kind)).sort(byKind);
    for (const row of rows) row.kind_order = kinds.indexOf(row.kind);
    return { rows, words: { kinds, kind_colors: kinds.map(kindColor) } };
  },
  timeline() {
    const rows = [], notes = [], kinds = unique(DATA.timelines.flatMap((t) => t.kinds.filter((_, k) => t.bytes.some((sizes) => sizes[k])))).sort(byKind), phases = unique(DATA.timelines.flatMap((t) => t.phases));
    for (const t of DATA.timelines) {
      const totals = t.bytes.map((sizes) => sizes.reduce((sum, size) => sum + size, 0)), peak = totals.indexOf(Math.max(...totals));
      const largest = t.kinds.map((kind, k) => [kind, t.bytes[peak][k]]).sort((a, b) => b[1] - a[1]).slice(0, 3);
      const peak_text = `${asBytes(totals[peak])} in ${t.phases[peak]}`;
      notes.push(`${t.method}: ${peak_text}, of it ${largest.map(([kind, size]) => `${kind} ${asBytes(size)}`).join(', ')}.`);
      const start = t.times[0], times = t.times.map((time) => time - start);
      times.forEach((time, index) => kinds.forEach((kind, order) => rows.push({ method: t.method, name: t.method, time, kind, kind_order: order, bytes: t.bytes[index][t.kinds.indexOf(kind)] ?? 0, is_peak: index == peak, peak_bytes: totals[peak], peak_text, value_text: peak_text })));
      for (let from = 0; from < times.length;) {
        let to = from;
        while (to < times.length && t.phases[to] == t.phases[from]) to++;
        rows.push({ method: t.method, phase: t.phases[from], phase_start: times[from], phase_end: times[Math.min(to, times.length - 1)], kind: kinds[0], kind_order: 0, time: times[from], bytes: 0 });
        from = to;
      }
    }
    const height = document.body.clientWidth < 520 ? 220 : 280;
    return { rows, words: { kinds, kind_colors: kinds.map(kindColor), phases, phase_colors: phases.map((_, index) => ['var(--soft)', 'var(--accent)', 'var(--warn-line)', 'var(--bad)'][index % 4]), phase_top: height - 7, panel_height: height, panels: DATA.timelines.map((t) => t.method), columns: columnsThatFit(DATA.timelines.length) }, notes, free: FIELDS };
  },
  curves() {
    const axes = curveAxes(), y = STATE.y, x = axes.includes(STATE.x) ? STATE.x : axes[0];
    const panels = panelFields().filter((name) => name != x), panel = panels.includes(STATE.panel) ? STATE.panel : null;
    if (!x) return { rows: [] };
    const value = (s, name) => (name == 'depth' ? s.num_blocks ?? WORKLOADS[s.w].depth : name in WORKLOADS[s.w] ? WORKLOADS[s.w][name] : s[name]);
    let these = chosen([x, panel]).filter((s) => known(s[y]) && known(value(s, x)) && !s.is_start && !s.is_answer && !s.is_trial && (y != 'score' || s.is_trained) && (y != 'union_fraction' || !s.is_assumed));
    const options = DATA.options.filter((name) => name != x && name != panel && unique(these.map((s) => s[name])).length > 1);
    const varied = (s, name) => unique(these.filter((t) => t.method == s.method).map((t) => t[name])).length > 1;
    const isError = ERRORS.includes(y), bytes = DATA.columns[y]?.[1] == 'bytes';
    const positive = these.map((s) => s[y]).filter((v) => v > 0), floor = Math.min(...positive, 1) / 10;
    const [unit, size] = bytes ? unitFor(Math.max(...positive, 1)) : ['', 1];
    const rows = these.map((s) => {
      const changed = options.filter((name) => known(s[name]) && s[name] !== '' && varied(s, name)).map((name) => `${words(name)}=${s[name]}`);
      return { cell: s.cell, method: s.method, seeds: s.seeds, x: value(s, x),
        y: isError && s[y] == 0 ? (positive.length ? floor : 0) : s[y] / size, is_zero: isError && s[y] == 0,
        low: y == 'score' ? s.score_low : null, high: y == 'score' ? s.score_high : null,
        text: asText(y, s[y]), value_text: asText(y, s[y]), panel: panel ? `${words(panel)}: ${shown(panel, value(s, panel))}` : '',
        line: [s.method, ...changed, s.seeds ? `seeds ${s.seeds}` : ''].filter(Boolean).join(' · '),
        name: [s.method, ...changed].join(' · ') };
    });
    const along = new Set(rows.map((row) => row.x));
    if (along.size < 2) return { rows: [] };
    const names = unique(rows.map((row) => row.panel)).sort((a, b) => byNumber(a.split(': ').pop(), b.split(': ').pop())).slice(0, 9);
    const log = isError ? positive.length > 0 : STATE.scale == 'log', ordinal = typeof rows[0].x == 'string';
    return { rows: rows.filter((row) => names.includes(row.panel)), words: {
      x: words(x), y: words(y) + (bytes ? ` (${unit})` : ''), panels: names, columns: Math.min(names.length, columnsThatFit(names.length)),
      y_format: isError ? '.0e' : undefined, scale: ordinal ? 'point' : STATE.scale == 'log' && ![...along].some((v) => v <= 0) ? 'log' : 'linear', x_type: ordinal ? 'ordinal' : 'quantitative', y_scale: log && (isError || rows.every((row) => row.y > 0)) ? 'log' : 'linear',
      zero: log || y == 'score' || ordinal ? undefined : true, resolve: 'shared' },
      notes: [zeroNote(rows, positive), these.some((s) => s.is_predicted) && 'Predicted, not measured.', these.some((s) => s.is_assumed) && 'Some settings assume the share of active neurons.'], free: [x, panel] };
  },
  matrix() {
    const y = STATE.y_bytes, free = FIELDS.filter((field) => field != 'device');
    let these = chosen(free).filter((s) => !s.is_answer && !s.is_trial && (known(s[y]) || s.status == 'oom'));
    const loads = () => unique(these.map((s) => s.w));
    const narrowed = [];
    for (const field of ['seq_len', 'batch_size', 'depth', 'task', 'attention', 'weights_dtype', 'dtype', 'backbone']) {
      if (loads().length <= 60) break;
      if (!FIELDS.includes(field)) continue;
      these = these.filter((s) => String(WORKLOADS[s.w][field]) === STATE[field]);
      narrowed.push(field);
    }
    const best = new Map();
    for (const s of these) {
      const key = `${s.w}|${s.method}`, other = best.get(key);
      if (!other || !known(other[y]) || (known(s[y]) && s[y] < other[y])) best.set(key, s);
    }
    const against = these.some((s) => s.method == STATE.against) ? STATE.against : DATA.against;
    const rows = [...best.values()].map((s) => {
      const reference = best.get(`${s.w}|${against}`), other = reference?.[y], relative = known(s[y]) && other ? 100 * (s[y] / other - 1) : null;
      const rounded = known(relative) ? Math.round(relative) : null;
      return { cell: s.cell, method: s.method, name: s.name, workload: WORKLOADS[s.w].title, w: s.w, relative, state: !known(s[y]) ? s.status : known(relative) ? 'ok' : reference?.status == 'oom' ? 'fits' : 'alone',
        value_text: known(s[y]) ? asText(y, s[y]) : s.text,
        relative_text: known(relative) ? `${relative < 0 ? '−' : '+'}${Math.abs(relative).toFixed(1)} % of ${against}` : '–',
        short: known(relative) ? (rounded < 0 ? `−${-rounded}` : rounded > 0 ? `+${rounded}` : '=') : known(s[y]) ? (reference?.status == 'oom' ? 'fits' : '·') : s.status == 'oom' ? '×' : '?' };
    });
    if (loads().length < 4 || unique(rows.map((row) => row.method)).length < 2) return { rows: [] };
    return { rows: rows.slice(0, 2000), words: { y: words(y), against, cell_width: 40 }, notes: [narrowed.length && `More workloads than fit: only those with the chosen ${narrowed.map(words).join(', ')}.`, these.some((s) => s.is_predicted) && 'Predicted, not measured.'], free };
  },
  traffic() {
    const rows = [];
    for (const s of inWorkload(chosen().filter((s) => known(s.transfer_bytes)))) {
      PARTS.forEach((part, index) => {
        const list = spread(s, part), bytes = list?.reduce((sum, value) => sum + (value ?? 0), 0) ?? 0;
        if (bytes) rows.push({ name: s.name, method: s.method, cell: s.cell, bytes, part: part.split('_').slice(0, 2).map((word) => PART_WORDS[word]).join(', '), part_order: index, total: s.transfer_bytes, value_text: asBytes(s.transfer_bytes), order: s.transfer_bytes, paper_bytes: s.paper_transfer_bytes, dense_bytes: s.dense_transfer_bytes });
      });
      if (!rows.some((row) => row.name == s.name)) for (const [index, name] of ['h2d_bytes', 'd2h_bytes'].entries()) rows.push({ name: s.name, method: s.method, cell: s.cell, bytes: s[name], part: PART_WORDS[name.slice(0, 3)], part_order: index, total: s.transfer_bytes, value_text: asBytes(s.transfer_bytes), order: s.transfer_bytes, paper_bytes: s.paper_transfer_bytes, dense_bytes: s.dense_transfer_bytes });
    }
    const ordered = rows.slice().sort((a, b) => a.part_order - b.part_order), parts = unique(ordered.map((row) => row.part));
    return { rows, words: { parts, part_colors: parts.map((_, index) => `var(--k${index + 1})`) } };
  },
  step_ratios() {
    const all = chosen(['depth']).filter((s) => known(s.step_ratio)), several = unique(all.map((s) => s.w)).length > 1;
    const rows = all.map((s) => ({ ...s, name: several ? `${s.name} · ${s.num_blocks} blocks` : s.name, from: s.step_ratio - (s.step_ratio_iqr ?? 0) / 2, to: s.step_ratio + (s.step_ratio_iqr ?? 0) / 2, order: s.step_ratio, value_text: `${s.step_ratio.toFixed(2)}×` })).slice(0, 40);
    return { rows, notes: [rows.length && `Compared with ${unique(rows.map((row) => row.reference)).join(', ')}; timed steps: ${unique(rows.map((row) => row.num_turns)).sort(byNumber).join(', ')}.`] };
  },
  blocks() {
    const present = blockColumns(), column = present.includes(STATE.by_block) ? STATE.by_block : present[0];
    if (!column) return { rows: [] };
    const isError = ERRORS.includes(column), lists = inWorkload(chosen()).map((s) => [s, spread(s, column)]).filter(([, list]) => list?.length > 1);
    const positive = lists.flatMap(([, list]) => list).filter((v) => v > 0), floor = Math.min(...positive, 1) / 10;
    const [unit, size] = DATA.columns[column][1] == 'bytes' ? unitFor(Math.max(...positive, 1)) : ['', 1];
    const rows = lists.flatMap(([s, list]) => list.map((value, index) => ({ cell: s.cell, name: s.name, method: s.method, x: index + 1, is_zero: isError && value === 0, y: isError && value === 0 ? (positive.length ? floor : 0) : known(value) ? value / size : null, text: asText(column, value), value_text: asText(column, value) }))).filter((row) => known(row.y));
    const broken = lists.filter(([, list]) => list.some((v) => !known(v))).map(([s]) => s.name);
    return { rows, words: { y: words(column) + (unit && ` (${unit})`), y_format: isError && positive.length ? '.0e' : undefined, y_scale: isError && positive.length ? 'log' : 'linear', zero: isError && positive.length ? undefined : true }, notes: [zeroNote(rows, positive), broken.length && `Not finite in some blocks: ${broken.slice(0, 8).join(', ')}.`] };
  },
  predictions() {
    const quantities = unique(PREDICTIONS.map((row) => words(row.quantity))), counts = new Map();
    const rows = PREDICTIONS.map((row) => {
      const count = (counts.get(row.quantity) ?? 0) + 1;
      counts.set(row.quantity, count);
      return { ...row, quantity: words(row.quantity), workload: WORKLOADS[row.w].title, offset: (count * 0.618) % 1, measured_text: asText(row.quantity, row.measured), predicted_text: asText(row.quantity, row.predicted), value_text: `${row.error.toFixed(2)} %, ${words(row.quantity)}` };
    });
    const notes = quantities.map((quantity) => {
      const errors = rows.filter((row) => row.quantity == quantity).map((row) => Math.abs(row.error)).sort(byNumber);
      return `${quantity}: half of ${errors.length} errors are below ${errors[Math.floor((errors.length - 1) / 2)].toFixed(2)} %.`;
    });
    if (rows.some((row) => row.is_assumed)) notes.push('Of sparse adapters, the share of active neurons is assumed.');
    return { rows, words: { label: 110 }, notes, free: FIELDS };
  },
  published() {
    const rows = decode(DATA.published).map((row) => ({ ...row, name: row.source, kind: row.is_calibration ? 'an assumption was fitted to it' : 'predicted', measured_text: asBytes(row.measured), predicted_text: asBytes(row.predicted), value_text: `${row.case}, ${row.error.toFixed(1)} %` }));
    const errors = rows.filter((row) => !row.is_calibration).map((row) => Math.abs(row.error)).sort(byNumber);
    return { rows, notes: [errors.length && `Without fitted ones, half of ${errors.length} errors are below ${errors[Math.floor((errors.length - 1) / 2)].toFixed(2)} %.`], free: FIELDS };
  },
  losses() {
    const rows = [];
    for (const s of inWorkload(chosen().filter((t) => !t.is_trial))) for (const cell of s.cells) {
      const curve = get('loss_curve', cell);
      if (!curve || curve.length < 3 || rows.length > 20000) continue;
      const every = Math.ceil(curve.length / 128), last = curve.findLast(known);
      curve.forEach((y, index) => { if (known(y) && index % every == 0) rows.push({ cell, name: s.name, method: s.method, line: `${s.name} · seed ${get('seed', cell)}`, x: index + 1, y, last, value_text: `${last?.toFixed(3)} at the end` }); });
    }
    return { rows };
  },
};
const AXES = ['depth', 'batch_size', 'seq_len', 'dtype', 'attention'];
// An axis is something that varies within a method; methods may differ in learning rate.
const isWithinMethod = (these, name) => DATA.looks.some((look) => unique(these.filter((s) => s.method == look.name).map((s) => (name in WORKLOADS[s.w] ? WORKLOADS[s.w][name] : s[name]))).length > 1);
const curveAxes = () => [...AXES, ...DATA.options].filter((name) => {
  const these = chosen([name]).filter((s) => !s.is_answer && !s.is_trial && known(s[STATE.y]));
  const values = these.map((s) => (name in WORKLOADS[s.w] ? WORKLOADS[s.w][name] : s[name])).filter((v) => known(v) && v !== '');
  return values.length > 1 && unique(values).length > 1 && isWithinMethod(these, name) && !['reference', 'warmup_steps', 'eval_every', 'eval_rows', 'patience', 'max_steps', 'optimizer'].includes(name);
});
const panelFields = () => [...FIELDS.filter((field) => field != 'place'), ...DATA.options].filter((name) => {
  const count = unique(chosen([name]).map((s) => String(name in WORKLOADS[s.w] ? WORKLOADS[s.w][name] : s[name]))).length;
  return count > 1 && !['reference', 'warmup_steps'].includes(name);
});
const numberNames = (test = () => true) => DATA.numbers.filter((name) => test(name) && !['step_ratio_iqr', 'majority_score', 'num_blocks'].includes(name) && SETTINGS.some((s) => known(s[name])));
const blockColumns = () => BY_BLOCK.filter((column) => chosen().some((s) => spread(s, column)?.length > 1));
