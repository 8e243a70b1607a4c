// Decoding of the page's data, words for numbers, small helpers.
const DATA = await (await inflate('#data')).json();

const at = (column, row) => {
  if (!column) return null;
  if (column.values) return column.values[row];
  const place = column.at[row];
  return place == null ? null : column.words[place];
};
const decode = ({ rows, columns }) => Array.from({ length: rows }, (_, row) =>
  Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, at(column, row)])));
const CELLS = DATA.cells.columns;
const get = (name, cell) => at(CELLS[name], cell);
const peakOf = (cell) => DATA.breakdowns.kept[DATA.breakdowns.of[cell]];
const SETTINGS = decode(DATA.settings), PAIRS = decode(DATA.pairs), PREDICTIONS = decode(DATA.predictions), WORKLOADS = DATA.workloads;
const LOOKS = new Map(DATA.looks.map((look) => [look.name, look]));

const words = (name) => name.replace(/_bytes$/, '').replaceAll('_', ' ');
const known = (value) => value !== null && value !== undefined;
const SYMBOLS = { seconds: 's', joules: 'J', watts: 'W', megahertz: 'MHz' };
const UNITS = [['GiB', 2 ** 30], ['MiB', 2 ** 20], ['KiB', 2 ** 10], ['B', 1]];
const unitFor = (most) => UNITS.find(([, size]) => most >= size) ?? UNITS[3];
const asBytes = (number) => {
  const [unit, size] = unitFor(Math.abs(number));
  return `${unit == 'B' ? number : (number / size).toPrecision(4).replace(/\.?0+$/, '')} ${unit}`;
};
const asText = (name, value) => {
  if (!known(value)) return '–';
  if (Array.isArray(value)) return `${value.length} numbers`;
  if (typeof value == 'boolean') return value ? 'yes' : 'no';
  if (typeof value == 'string') return value;
  const unit = DATA.columns[name]?.[1];
  if (unit == 'bytes') return asBytes(value);
  if (SYMBOLS[unit]) return `${+value.toPrecision(3)} ${SYMBOLS[unit]}`;
  if (Math.abs(value) >= 1e9 && unit != 'count') return value.toExponential(1);
  if (Number.isInteger(value)) return value.toLocaleString('en');
  return String(+value.toPrecision(4));
};
const unique = (values) => [...new Set(values)];
const say = (text) => { $('#live').textContent = text; };
const save = (name, kind, content) => {
  const link = make('a', { href: URL.createObjectURL(new Blob([content], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
