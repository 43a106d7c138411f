// Follows the end of the thread while the reader is there, and holds what the reader looks at when a thought folds.

const NEAR_PX = 40;
const HELD_MS = 250;   // until the browser has found the sizes of what has come or gone

export class EndFollower {
  /** scroller holds content and, below it, the spacer: empty room that keeps a scroll position valid after a fold. */
  constructor(scroller, content, spacer, onChange) {
    Object.assign(this, { scroller, content, spacer, onChange, isFollowing: true, spacerPx: 0, lastTop: 0 });
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    const observer = new ResizeObserver(() => this.#resized());
    observer.observe(content);
    observer.observe(scroller);
  }

  /** The scroll position at which the end of the content is in view; negative if the content is shorter. */
  #endTop() {
    return this.content.offsetHeight - this.scroller.clientHeight;
  }

  #setSpacer(px) {
    px = Math.max(0, Math.ceil(px));
    if (px === this.spacerPx) return;
    this.spacerPx = px;
    this.spacer.style.height = `${px}px`;
  }

  #scrolled() {
    const top = this.scroller.scrollTop;
    const distance = this.#endTop() - top;
    if (distance < NEAR_PX) this.isFollowing = true;
    else if (top < this.lastTop) this.isFollowing = false;   // growth alone never ends the following
    this.lastTop = top;
    if (this.spacerPx) this.#setSpacer(-distance);
    this.onChange(distance >= NEAR_PX && !this.isFollowing);
  }

  #resized() {
    const end = this.#endTop();
    const top = this.scroller.scrollTop;
    if (this.spacerPx) this.#setSpacer(top - end);
    if (this.isFollowing && !this.release && (end > top || !this.spacerPx)) this.#scrollTo(end);
    this.onChange(!this.isFollowing && end - top >= NEAR_PX);
  }

  /** Go to the end and follow it. */
  toEnd() {
    this.#setSpacer(0);
    this.isFollowing = true;
    this.#scrollTo(this.#endTop());
  }

  #scrollTo(top) {
    this.lastTop = Math.max(0, top);
    this.scroller.scrollTop = this.lastTop;
  }

  isVisible(element) {
    const box = element.getBoundingClientRect();
    const view = this.scroller.getBoundingClientRect();
    return box.bottom > view.top && box.top < view.bottom;
  }

  /** Run change() with `element` (afterwards: what change() returns, if anything) at the same place of the screen. */
  hold(element, change) {
    const before = element.getBoundingClientRect().top;
    this.scroller.classList.add("held");
    const held = change() ?? element;
    const top = this.scroller.scrollTop + held.getBoundingClientRect().top - before;
    this.#setSpacer(top - this.#endTop());
    this.#scrollTo(top);
    this.isFollowing = this.spacerPx === 0 && this.#endTop() - top < NEAR_PX;
    clearTimeout(this.release);
    this.release = setTimeout(() => {
      this.release = null;
      this.scroller.classList.remove("held");
    }, HELD_MS);
  }
}
