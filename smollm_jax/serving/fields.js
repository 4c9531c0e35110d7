() => {
  // A wrong value stays in its field, with a message below. Nothing is sent until the value is right.
  const LARGEST_SEED = 2 ** 32 - 1, MOST_STOPS = 4, LONGEST_STOP = 100;
  const SENDERS = '#continue, #again-continue, #send, #again-send, #compare';
  const fields = () => [...document.querySelectorAll('#settings :is(input[type=number], #seed input, #seed textarea, #stop-strings textarea)')];
  const problem = (field) => {
    const text = field.value.trim();
    if (field.closest('#seed'))
      return text === '' || (/^\d+$/.test(text) && Number(text) <= LARGEST_SEED) ? '' : 'a whole number from 0 to 4,294,967,295, or empty';
    if (field.closest('#stop-strings')) {
      const lines = field.value.split('\n').filter(Boolean);
      return lines.length <= MOST_STOPS && lines.every((line) => line.length <= LONGEST_STOP) ? '' : 'up to 4 lines of 100 characters';
    }
    const { min, max, step } = field.closest('.block').querySelector('input[type=range]') ?? field, value = field.valueAsNumber;
    if (!(value >= Number(min) && value <= Number(max))) return `a number from ${Number(min).toLocaleString('en')} to ${Number(max).toLocaleString('en')}`;
    return Number(step) === 1 && !Number.isInteger(value) ? 'a whole number' : '';
  };
  const tell = (field) => {
    const block = field.closest('.block'), words = problem(field), name = `${block.id || field.id}-error`;
    let line = block.querySelector('.field-error');
    if (!words) {
      line?.remove();
      field.removeAttribute('aria-invalid');
      field.removeAttribute('aria-describedby');
      return true;
    }
    if (!line) {
      line = Object.assign(document.createElement('p'), { className: 'field-error', id: name });
      line.setAttribute('role', 'alert');
      block.append(line);
    }
    const shown = field.value.length > 20 ? `${field.value.slice(0, 20)}…` : field.value;
    if (line.textContent !== `${shown || 'nothing'}: must be ${words}`) line.textContent = `${shown || 'nothing'}: must be ${words}`;
    field.setAttribute('aria-invalid', 'true');
    field.setAttribute('aria-describedby', name);
    return false;
  };
  const isField = (target) => target instanceof Element && fields().includes(target);
  document.addEventListener('input', ({ target }) => {
    if (isField(target)) return tell(target);
    const number = target.closest?.('#settings .block')?.querySelector('input[type=number]');
    if (number) setTimeout(() => tell(number));  // its slider was moved
  });
  for (const kind of ['blur', 'focusout', 'change', 'pointerup'])  // on which Gradio would put the nearest allowed value
    window.addEventListener(kind, (event) => {
      if (isField(event.target) && event.target.type === 'number' && !tell(event.target)) event.stopImmediatePropagation();
    }, true);
  const refuse = (event) => {
    const wrong = fields().filter((field) => !tell(field));
    if (!wrong.length) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    document.querySelector('#settings > button:not(.open)')?.click();
    setTimeout(() => wrong[0].focus(), 50);
  };
  window.addEventListener('click', (event) => event.target.closest?.(SENDERS) && refuse(event), true);
  window.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && event.target.closest?.('#message')) refuse(event);
  }, true);
}
