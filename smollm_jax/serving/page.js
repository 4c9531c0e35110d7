() => {
  // Gradio calls this function when the page loads; the page's buttons call what it defines.
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
