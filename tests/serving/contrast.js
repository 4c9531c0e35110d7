() => {
  // The texts on a page whose contrast is below WCAG 2.2 AA: 4.5 to 1, or 3 to 1 if large.
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
    return colour.startsWith('color(') ? [r * 255, g * 255, b * 255, a] : [r, g, b, a];
  };
  const over = (front, back) => [0, 1, 2].map((i) => front[i] * front[3] + back[i] * (1 - front[3])).concat(1);
  const linear = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const found = [];
  const check = (element, text, colour) => {
    const style = getComputedStyle(element);
    const seen = element.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });
    if (!text.trim() || !seen || element.closest('[disabled], [aria-hidden=true]')) return;
    let back = [255, 255, 255, 1], opacity = 1;
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      layers.unshift(parse(getComputedStyle(one).backgroundColor));
      opacity *= Number(getComputedStyle(one).opacity);
    }
    for (const layer of layers) back = over(layer, back);
    const [r, g, b, a] = parse(colour ?? style.color);
    const [low, high] = [luminance(over([r, g, b, a * opacity], back)), luminance(back)].sort((x, y) => x - y);
    const ratio = (high + 0.05) / (low + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${element.tagName} ${text.trim().slice(0, 40)}`);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) check(texts.currentNode.parentElement, texts.currentNode.textContent);
  for (const box of document.querySelectorAll('textarea, input:not([type=radio], [type=checkbox], [type=range])'))
    check(box, box.value || box.placeholder, box.value ? null : getComputedStyle(box, '::placeholder').color);
  return found;
}
