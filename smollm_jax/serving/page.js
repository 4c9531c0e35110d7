() => {
  // Gradio calls this function when the page loads; the page's events call the functions of `window.notebook`.
  const STATUSES = ['status', 'chat-status', 'left-status', 'right-status'];
  const KEY = 'smollm-jax', MOST_ENTRIES = 200, MOST_CHARACTERS = 1_000_000, TYPING_PAUSE = 800;
  const element = (id) => document.getElementById(id);
  const sheet = () => document.querySelector('#sheet textarea');
  const message = () => document.querySelector('#message textarea');
  const visible = (id) => element(id)?.offsetParent ? element(id) : null;

  // ---- what is kept in this browser: the text's history, the settings, the conversation
  let kept = {};
  try { kept = JSON.parse(localStorage.getItem(KEY)) ?? {}; } catch { /* damaged: begin anew */ }
  // the history is a log, which loses entries only if it is too long. `from` is the text before a continuation
  let past = Array.isArray(kept.past) && kept.past.every((one) => typeof one?.text === 'string') ? kept.past : [];
  if (!past.length) past = [{ text: '' }];
  // which characters the model wrote: [start, end) each
  const marksOf = (one) => Array.isArray(one.marks) ? one.marks.filter((mark) => mark?.length === 2) : [];
  const edited = (marks, old, text) => {
    let start = 0, end = 0;
    const shortest = Math.min(old.length, text.length);
    while (start < shortest && old[start] === text[start]) start++;
    while (end < shortest - start && old[old.length - 1 - end] === text[text.length - 1 - end]) end++;
    const moved = text.length - old.length, rest = old.length - end;
    const pieces = marks.flatMap(([a, b]) => [[a, Math.min(b, start)], [Math.max(a, rest) + moved, b + moved]]);
    return pieces.filter(([a, b]) => a < b).reduce((all, [a, b]) => {
      if (all.at(-1)?.[1] === a) all.at(-1)[1] = b;
      else all.push([a, b]);
      return all;
    }, []);
  };
  const marksNow = (text, began) => {
    // half of a continuation may be an entry too, if the page was left meanwhile
    const one = past.slice(0, at + 1).findLast((one) => one.text === began);
    return one && text.startsWith(began) ? edited([...marksOf(one), [began.length, text.length]], text, text)
      : edited(marksOf(past[at]), past[at].text, text);
  };
  let at = Math.min(Math.max(Number(kept.at) || 0, 0), past.length - 1);
  let writing = false, follow = true, from = null, typing = 0;

  const keep = (more = {}) => {
    kept = { ...kept, ...more, past, at };
    try { localStorage.setItem(KEY, JSON.stringify(kept)); } catch { /* full or forbidden: the page works without */ }
  };
  const record = (text, began) => {
    clearTimeout(typing);
    if (typeof text !== 'string') return;
    text = text.replaceAll(/\r\n?/g, '\n');  // as a text box gives it back
    if (past[at].text === text) return;  // an unchanged text is no entry
    const marks = marksNow(text, began);
    if (at < past.length - 1) past.push(past[at]);  // an undone text stays in the log
    past.push(began == null ? { text, marks } : { text, marks, from: began });
    let size = past.reduce((sum, one) => sum + one.text.length, 0);
    while (past.length > 1 && (past.length > MOST_ENTRIES || size > MOST_CHARACTERS)) size -= past.shift().text.length;
    at = past.length - 1;
    keep();
  };
  const step = (by, nothing) => {
    record(sheet()?.value);
    const found = at + by in past;
    if (found) at += by;
    keep();
    return [past[at].text, found ? '' : nothing];
  };
  const busy = (on) => {
    writing = on;
    for (const id of STATUSES) element(id)?.setAttribute('aria-busy', on);
    if (sheet()) sheet().readOnly = on;  // the next chunk would replace any text typed meanwhile
  };

  window.notebook = {
    begin() { record(sheet()?.value); from = past[at].text; follow = true; busy(true); return []; },
    beginAgain() {
      record(sheet()?.value);
      const last = past.slice(0, at + 1).findLast((one) => one.from != null);
      from = last ? last.from : null;
      if (last) record(from);
      follow = true;
      busy(true);
      return [];
    },
    before: () => from,
    isWriting: () => writing,
    marks: () => marksNow(sheet().value, writing ? from : null),  // what the model wrote of the text that is shown
    end(text) { busy(false); record(text, from); return []; },
    beginChat() { busy(true); return []; },
    endChat(typed, talk) { busy(false); keep({ talk, message: typed }); return []; },
    // a question never replaces what a person has typed
    ask(typed, question, all) {
      document.querySelector('#message textarea')?.focus();
      return typed.trim() && !all.includes(typed) ? `${typed}\n${question}` : question;
    },
    undo: () => step(-1, 'nothing to undo'),
    redo: () => step(1, 'nothing to redo'),
    open(text) { record(sheet()?.value); record(text); follow = false; return [text, '']; },
    settings(values) { keep({ settings: values }); return []; },
    // return the values of a link and, for what it lacks, a fresh page. Without a link: kept values, else fresh ones
    restore(values, longest) {
      const [, ...fresh] = values;
      let settings = kept.settings?.length === fresh.length ? kept.settings : fresh, text = past[at].text;
      const link = new URLSearchParams(location.hash.slice(1));
      if (link.has('prompt')) {
        text = link.get('prompt');
        record(text);
        settings = fresh.map((value, i) => {
          const given = link.get(`s${i}`);
          return given === null ? value : typeof value === 'number' ? Number(given) : given;
        });
        history.replaceState(null, '', location.pathname + location.search);  // a reload keeps later changes
      }
      if (innerWidth < 641)  // folded on a phone
        for (const one of document.querySelectorAll(':is(#settings, #about) > button.open')) one.click();
      settings = [...settings];
      settings[LENGTH] = Math.min(settings[LENGTH], longest);
      return [text, ...settings];
    },
    markdown(on) { document.body.classList.toggle('plain-answers', !on); keep({ markdown: on }); return []; },
    restoreMarkdown(on) {
      on = kept.markdown ?? on;
      document.body.classList.toggle('plain-answers', !on);
      return on;
    },
    restoreTalk(typed, talk, system) {
      const turns = kept.talk, roles = ['user', 'assistant'];
      const whole = Array.isArray(turns) && turns.length % 2 === 0 &&
        turns.every((turn, i) => turn?.role === roles[i % 2] && typeof turn.content === 'string');
      return [kept.message ?? typed, whole ? turns : talk, kept.system ?? system];
    },
    restoreComparison: (text) => kept.comparison ?? text,
    link(values) {
      const [text, ...settings] = values, link = new URLSearchParams({ prompt: text });
      settings.forEach((value, i) => value !== null && value !== '' && link.set(`s${i}`, value));
      navigator.clipboard?.writeText(`${location.origin}${location.pathname}#${link}`);
      return [navigator.clipboard ? 'the link is in the clipboard' : 'this browser gives no clipboard'];
    },
    preset: (values, presets) =>
      Object.keys(presets).find((name) => presets[name].every((value, i) => value === values[i])) ?? 'Custom',
    address: (text) => text.replaceAll('ADDRESS', location.origin + location.pathname.replace(/\/$/, '')),
  };
  const LENGTH = 5;  // index of the length in the settings, after the preset and four sliders

  document.addEventListener('input', (event) => {
    if (event.target.closest('#compare-prompt')) kept.comparison = event.target.value;
    else if (event.target.closest('#system')) kept.system = event.target.value;
    else if (event.target === message()) kept.message = event.target.value;  // until its answer has come
    else if (event.target !== sheet() || writing) return;
    clearTimeout(typing);
    typing = setTimeout(leave, TYPING_PAUSE);
  });
  const leave = () => { record(sheet()?.value, writing ? from : null); keep(); };
  window.addEventListener('pagehide', leave);
  document.addEventListener('visibilitychange', () => document.hidden && leave());

  // ---- the view follows the text unless the reader has scrolled up
  let moved = 0;  // when the reader last moved the view
  for (const kind of ['wheel', 'touchmove', 'pointerdown', 'keydown'])
    document.addEventListener(kind, (event) => { if (event.target === sheet()) moved = performance.now(); }, { passive: true });
  document.addEventListener('scroll', ({ target }) => {
    if (target !== sheet() || performance.now() - moved > 400) return;
    follow = target.scrollTop + target.clientHeight > target.scrollHeight - 48;
  }, { capture: true, passive: true });
  let shown = '';
  const look = () => {
    const box = sheet();
    if (box && box.value !== shown) {
      shown = box.value;
      if (writing && follow) box.scrollTop = box.scrollHeight;
    }
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);

  // ---- keys and focus
  document.addEventListener('keydown', (event) => {
    const id = event.key === 'Enter' && (event.ctrlKey || event.metaKey) ? ['continue', 'send', 'compare']
      : event.key === 'Escape' ? ['stop-continue', 'stop-send', 'stop-compare'] : [];
    const button = id.map(visible).find(Boolean);
    if (!button) return;
    event.preventDefault();
    event.stopPropagation();
    button.click();
  }, true);
  const PARTNERS = { continue: 'stop-continue', 'again-continue': 'stop-continue', 'stop-continue': 'continue',
    send: 'stop-send', 'again-send': 'stop-send', 'stop-send': 'send', compare: 'stop-compare', 'stop-compare': 'compare' };
  let last = null;  // the button with the focus, which may vanish
  document.addEventListener('focusin', ({ target }) => { last = target.closest('button')?.id ?? null; });
  document.addEventListener('pointerdown', () => { last = null; });
  new MutationObserver(() => {
    if (last in PARTNERS && (document.activeElement === document.body || document.activeElement?.disabled))
      visible(PARTNERS[last])?.focus({ preventScroll: true });
    for (const id of STATUSES)
      if (element(id)?.getAttribute('role') === null) {
        element(id).setAttribute('role', 'status');
        element(id).setAttribute('aria-live', 'polite');
      }
  }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ['disabled', 'class'] });

  // ---- the look
  const remembered = localStorage.getItem('dark');
  if (remembered) document.body.classList.toggle('dark', remembered === 'yes');
  window.toggleDark = () => {
    const dark = document.body.classList.toggle('dark');
    localStorage.setItem('dark', dark ? 'yes' : 'no');
  };
  window.copyAnswer = () => {
    const answer = [...document.querySelectorAll('.bot.message .message-content')].at(-1);
    if (answer) navigator.clipboard.writeText(answer.innerText);
  };
}
