// The page's only script: the slider through training, and the arrow keys within a strip.
const slider = document.getElementById('step');
if (slider) {
  const labels = JSON.parse(slider.dataset.labels);
  slider.parentElement.hidden = false;
  slider.addEventListener('input', () => {
    for (const step of document.querySelectorAll('.step'))
      step.classList.toggle('on', step.dataset.step === slider.value);
    document.getElementById('when').textContent = labels[slider.value];
  });
}
document.addEventListener('keydown', event => {
  const next = {ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling'}[event.key];
  const here = document.activeElement;
  if (next && here.matches('.strip b') && here[next] && here[next].matches('b')) {
    here[next].focus();
    event.preventDefault();
  }
});
