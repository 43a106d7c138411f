// Plain text of any length in small blocks, so that an append lays out one block and not the whole text.

const SOFT_CHARS = 1_500;   // a block ends at the first line break after this many characters
const HARD_CHARS = 4_000;   // and at the last space before this many

/** Index in `text` at which the block that now holds `length` characters ends; -1: the block takes everything. */
function findCut(text, start, length) {
  if (length + text.length - start <= SOFT_CHARS) return -1;
  const limit = start + HARD_CHARS - length;
  const line = text.indexOf("\n", start + Math.max(0, SOFT_CHARS - length));
  if (line !== -1 && line < limit) return line + 1;
  if (text.length <= limit) return -1;
  const space = text.lastIndexOf(" ", limit - 1);
  if (space > start) return space + 1;
  const code = text.charCodeAt(limit - 1);
  return code >= 0xd800 && code < 0xdc00 ? limit - 1 : limit;   // never between two halves of a character
}

/** The children of `root` are blocks of text; their textContent together is the text. */
export class TextBlocks {
  constructor(root) {
    this.root = root;
    this.node = null;
  }

  append(text) {
    for (let start = 0; start < text.length;) {
      const length = this.node?.length ?? 0;
      const cut = findCut(text, start, length);
      const piece = start === 0 && cut === -1 ? text : text.slice(start, cut === -1 ? undefined : cut);
      if (this.node) {
        this.node.appendData(piece);
      } else {
        const block = document.createElement("div");
        this.node = block.appendChild(document.createTextNode(piece));
        this.root.append(block);
      }
      if (cut === -1) return;
      this.node = null;
      start = Math.max(cut, start);
    }
  }

  replace(text) {
    this.root.replaceChildren();
    this.node = null;
    this.append(text);
  }
}
