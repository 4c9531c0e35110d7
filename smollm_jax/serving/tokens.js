() => {
  // What the model wrote has a tint, in a copy of the text behind the text box. Pointing at a token shows its
  // probability: the server is asked once per text, when somebody points at it.
  const DWELL = 300;  // milliseconds of a pointer that rests
  const box = () => document.querySelector('#sheet textarea');
  const make = (tag, name, text = '') => Object.assign(document.createElement(tag), { className: name, textContent: text });
  const copy = make('div', 'behind'), tip = make('div', 'tip');
  copy.setAttribute('aria-hidden', 'true');
  tip.id = 'token-tip';
  tip.setAttribute('role', 'status');
  tip.hidden = true;
  document.body.append(tip);

  // ---- the copy behind the text
  let text = null, signature = '', runs = [];
  const draw = (area) => {
    const marks = window.notebook.marks(), now = `${marks}`;
    if (text === area.value && signature === now) return;
    if (text !== area.value) hide();
    [text, signature, runs] = [area.value, now, []];
    let end = 0;
    const add = (until, name) => {
      if (until <= end) return;
      const span = make('span', name, text.slice(end, until));
      runs.push({ start: end, end: until, node: span.firstChild, span });
      end = until;
    };
    for (const [a, b] of marks) { add(a, 'typed'); add(b, 'written'); }
    add(text.length, 'typed');
    copy.replaceChildren(...runs.map((run) => run.span), ' ');
  };
  const place = (area) => {
    if (copy.parentElement !== area.parentElement) {
      area.parentElement.style.position = 'relative';
      area.before(copy);
    }
    const style = getComputedStyle(area);
    const wanted = { left: `${area.offsetLeft + area.clientLeft}px`, top: `${area.offsetTop + area.clientTop}px`,
      width: `${area.clientWidth}px`, height: `${area.clientHeight}px`, padding: style.padding, font: style.font,
      letterSpacing: style.letterSpacing, textAlign: style.textAlign };
    for (const [name, value] of Object.entries(wanted)) if (copy.style[name] !== value) copy.style[name] = value;
    if (copy.scrollTop !== area.scrollTop) { copy.scrollTop = area.scrollTop; hide(); }
  };
  const look = () => {
    const area = box();
    if (area?.offsetParent) { draw(area); place(area); }
    requestAnimationFrame(look);
  };

  // ---- tokens and their places
  let known = null, asked = null, timer = 0, pointer = null;
  const rangeOf = (start, end) => {
    const range = new Range();
    const from = runs.find((run) => start < run.end), to = runs.find((run) => end <= run.end);
    if (!from || !to) return null;
    range.setStart(from.node, start - from.start);
    range.setEnd(to.node, end - to.start);
    return range;
  };
  const under = ({ x, y }) => {
    let low = 0, high = known.tokens.length - 1;
    while (low <= high) {  // tokens lie in reading order
      const middle = (low + high) >> 1, token = known.tokens[middle];
      const range = rangeOf(token.start, token.end), rects = range ? [...range.getClientRects()] : [];
      if (rects.some((one) => x >= one.left && x <= one.right && y >= one.top && y <= one.bottom)) return { token, range };
      const first = rects[0], last = rects.at(-1);
      if (!first) return null;
      if (last.bottom < y || (last.top <= y && last.right < x)) low = middle + 1;
      else high = middle - 1;
    }
    return null;
  };
  const isOverWritten = ({ x, y }) => runs.some(({ span }) => span.className === 'written' && [...span.getClientRects()]
    .some((one) => x >= one.left && x <= one.right && y >= one.top && y <= one.bottom));

  // ---- the tip
  const visible = (token) => token === '' ? '(part of a character)' : token.replaceAll('\n', '↵').replaceAll(' ', '␣').replaceAll('\t', '⇥');
  const percent = (p) => p === null ? 'first token' : p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : '< 0.1 %';
  const hide = () => { tip.hidden = true; globalThis.CSS?.highlights?.delete('token'); };
  const show = (at, children) => {
    tip.replaceChildren(...children);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect(), below = at.bottom + 8;
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
    tip.style.top = `${below + height < innerHeight ? below : Math.max(8, at.top - height - 8)}px`;
  };
  const line = (token, p, isIt) => {
    const row = make('tr', isIt ? 'it' : ''), bar = make('td', 'bar'), length = make('span', '');
    length.style.width = `${Math.max(2, 100 * (p ?? 0))}%`;
    bar.append(length);
    row.append(make('td', 'token', visible(token)), make('td', 'p', percent(p)), bar);
    return row;
  };
  const tell = (at) => {
    const found = under(at);
    if (!found) return hide();
    const { token, range } = found, head = make('table', 'head'), table = make('table', 'others');
    head.append(line(token.text, token.p, true));
    table.append(...token.others.map(([other, p]) => line(other, p, other === token.text)));
    const note = make('p', '', token.p === null ? 'The model expects nothing before a first token.'
      : 'By the model itself: before temperature, penalty and filters.');
    globalThis.CSS?.highlights?.set('token', new Highlight(range));
    show(range.getBoundingClientRect(), token.p === null ? [head, note] : [head, make('p', 'title', 'Most probable here'), table, note]);
  };
  const weights = () => document.querySelector('#weights input')?.value ?? '';
  const point = () => {
    if (window.notebook.isWriting() || !pointer) return;
    if (known?.text === text && known.weights === weights()) return tell(pointer);
    if (!isOverWritten(pointer)) return hide();
    const here = { left: pointer.x, top: pointer.y, bottom: pointer.y + 8 };
    show(here, [make('p', '', 'Reading the probabilities…')]);
    if (asked !== null) return;
    asked = { text, weights: weights() };
    document.getElementById('look-up').click();
  };
  window.tokens = {
    found(json) {
      const { text: of, weights } = asked ?? {};
      asked = null;
      let found = null;
      try { found = JSON.parse(json); } catch { /* cancelled */ }
      hide();
      if (of !== text || !found) return [];
      const whole = Array.isArray(found) ? found.map(([token]) => token).join('') : null;
      const error = found.error ?? (text.endsWith(whole) ? null : 'The tokenizer changes this text, so its tokens have no place in it.');
      let start = text.length - (whole ?? '').length;
      const tokens = error ? [] : found.map(([token, p, others]) => ({ text: token, p, others, start, end: start += token.length }));
      known = found.error ? null : { text, weights, tokens: tokens.filter((token) => token.end > token.start) };
      if (error && pointer) show({ left: pointer.x, top: pointer.y, bottom: pointer.y + 8 }, [make('p', '', error)]);
      else if (pointer) tell(pointer);
      return [];
    },
  };
  document.addEventListener('pointermove', (event) => {
    clearTimeout(timer);
    pointer = event.target === box() ? { x: event.clientX, y: event.clientY } : null;
    if (!pointer) return hide();
    timer = setTimeout(point, known?.text === text ? 30 : DWELL);
  }, { passive: true });
  document.addEventListener('pointerdown', (event) => {
    if (event.pointerType !== 'touch' || event.target !== box()) return;
    pointer = { x: event.clientX, y: event.clientY };
    timer = setTimeout(point, DWELL);
  }, { passive: true });
  for (const kind of ['keydown', 'wheel']) document.addEventListener(kind, hide, { passive: true });
  requestAnimationFrame(look);
}
