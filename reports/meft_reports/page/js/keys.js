// Marks by keyboard. A mark that opens its cell by a click does so by Enter or Space too.
// Tab enters a figure once; arrow keys go from mark to mark, in reading order: by rows from
// the top, and within a row from the left. Home and End go to the first and the last one.
const SAME_ROW = 4; // Pixels between the centers of two marks that are on one row.
const isOpened = ({ __data__: item }) => item?.cursor == 'pointer' && item.mark.marktype != 'text' && known(item.datum?.cell);
const centerOf = (element) => {
  const box = element.getBoundingClientRect();
  return { x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2 };
};
const inRows = (elements) => {
  const placed = elements.map((element) => ({ element, ...centerOf(element) })).sort((a, b) => a.y - b.y), rows = [];
  for (const mark of placed) {
    if (rows.length && mark.y - rows.at(-1)[0].y <= SAME_ROW) rows.at(-1).push(mark);
    else rows.push([mark]);
  }
  return rows.map((row) => row.sort((a, b) => a.x - b.x));
};
const nameOf = (element) => {
  const shown = Object.entries(element.__data__.tooltip ?? {}).filter(([, value]) => !/^(\+?NaN|null|undefined|)$/.test(value));
  return shown.map(([name, value]) => `${name}: ${value}`).join('; ') || element.getAttribute('aria-label');
};
// The same numbers that a pointer shows. Vega listens to pointers only.
const pointAt = (element, type) => {
  const { x, y } = centerOf(element);
  element.dispatchEvent(new PointerEvent(type, { bubbles: true, clientX: x, clientY: y }));
};
// A ring of its own: the outline of a mark is below the marks that are drawn after it.
const ringAround = (element, drawing) => {
  const mark = element.getBoundingClientRect(), all = drawing.getBoundingClientRect();
  const ring = make('div', { className: 'ring' });
  Object.assign(ring.style, { left: `${mark.left - all.left}px`, top: `${mark.top - all.top}px`, width: `${mark.width}px`, height: `${mark.height}px` });
  drawing.append(ring);
};
const openByKeys = (figure, drawing) => {
  const rows = inRows([...drawing.querySelectorAll('svg path')].filter(isOpened)), marks = rows.flat();
  if (!marks.length) return;
  let current = 0;
  const rowOf = marks.map(() => 0);
  rows.reduce((start, row, index) => { rowOf.fill(index, start, start + row.length); return start + row.length; }, 0);
  const enter = (index) => {
    marks[current].element.setAttribute('tabindex', -1);
    current = index;
    marks[current].element.setAttribute('tabindex', 0);
  };
  const beside = (step) => {
    const row = rows[rowOf[current] + step], { x } = marks[current];
    return row ? marks.indexOf(row.reduce((best, mark) => (Math.abs(mark.x - x) < Math.abs(best.x - x) ? mark : best))) : current;
  };
  const moves = {
    ArrowRight: () => Math.min(current + 1, marks.length - 1), ArrowLeft: () => Math.max(current - 1, 0),
    ArrowDown: () => beside(1), ArrowUp: () => beside(-1), Home: () => 0, End: () => marks.length - 1,
  };
  marks.forEach(({ element }, index) => {
    const attributes = { id: `${figure.name}-mark-${index}`, tabindex: index ? -1 : 0, role: 'button', 'aria-haspopup': 'dialog', 'aria-label': nameOf(element) };
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.removeAttribute('aria-roledescription');
  });
  const places = new Map(marks.map(({ element }, index) => [element, index]));
  // The listeners are outside the vectors, which a browser would make a stop of Tab for them.
  drawing.addEventListener('focusin', ({ target }) => {
    if (!places.has(target)) return;
    enter(places.get(target));
    if (!target.matches(':focus-visible')) return;
    ringAround(target, drawing);
    pointAt(target, 'pointermove');
  });
  drawing.addEventListener('focusout', ({ target }) => {
    $('.ring', drawing)?.remove();
    if (places.has(target)) pointAt(target, 'mouseout');
  });
  drawing.addEventListener('keydown', (event) => {
    if (!places.has(event.target) || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key == 'Enter' || event.key == ' ') {
      pointAt(event.target, 'mouseout');
      openCell(event.target.__data__.datum.cell);
    } else if (moves[event.key]) marks[moves[event.key]()].element.focus();
    else return;
    event.preventDefault();
  });
};
