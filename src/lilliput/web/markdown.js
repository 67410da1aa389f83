// Markdown -> DOM nodes. Nothing is ever parsed as HTML: every text becomes a text node, links are http(s) and mailto only.
// Headings, lists (nested by indent), quotes, fences, tables, rules; inline code, bold, italics, links. Good while it is half written.

function make(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|\*(?=\S)([^*]*?\S)\*|\b_(?=\S)([^_]*?\S)_\b|\[([^\]]+)\]\(([^\s)]+)\)/g;

function inline(text, depth = 0) {
  const nodes = [];
  let last = 0;
  if (depth < 4) {
    for (const found of text.matchAll(INLINE)) {
      nodes.push(document.createTextNode(text.slice(last, found.index)));
      last = found.index + found[0].length;
      if (found[1]) nodes.push(make("code", found[2]));
      else if (found[3]) nodes.push(make("strong", ...inline(found[3], depth + 1)));
      else if (found[4] || found[5]) nodes.push(make("em", ...inline(found[4] || found[5], depth + 1)));
      else nodes.push(link(found[6], found[7], found[0], depth));
    }
  }
  nodes.push(document.createTextNode(text.slice(last)));
  return nodes;
}

function link(label, address, whole, depth) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return document.createTextNode(whole);
  const node = make("a", ...inline(label, depth + 1));
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

function fence(code, language) {
  const button = make("button", "Copy");
  button.type = "button";
  button.addEventListener("click", () => navigator.clipboard.writeText(code).then(() => { button.textContent = "Copied"; }));
  const inner = make("code", code);
  if (language) inner.dataset.language = language;
  const node = make("div", make("pre", inner), button);
  node.className = "block";
  return node;
}

const BULLET = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines, at) {
  const indent = lines[at].match(BULLET)[1].length;
  const ordered = /\d/.test(lines[at].match(BULLET)[2]);
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(lines[at].match(BULLET)[2], 10);
  while (at < lines.length) {
    const found = lines[at].match(BULLET);
    if (found && found[1].length >= indent + 2 && node.lastChild) {
      const [inner, next] = list(lines, at);
      node.lastChild.append(inner);
      at = next;
    } else if (found && found[1].length >= indent - 1) {
      if (/\d/.test(found[2]) !== ordered) break;
      node.append(make("li", ...inline(found[3])));
      at += 1;
    } else if (!found && lines[at].trim() && /^\s{2,}/.test(lines[at]) && node.lastChild) {
      node.lastChild.append(" ", ...inline(lines[at].trim()));
      at += 1;
    } else if (!lines[at].trim() && at + 1 < lines.length && BULLET.test(lines[at + 1])) at += 1;
    else break;
  }
  return [node, at];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines, at) {
  const node = make("table", make("tr", ...cells(lines[at]).map((cell) => make("th", ...inline(cell)))));
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) node.append(make("tr", ...cells(lines[at]).map((cell) => make("td", ...inline(cell)))));
  return [node, at];
}

export function render(text) {
  const result = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const open = line.match(/^\s{0,3}(```+|~~~+)\s*([\w+#-]*)/);
    if (open) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trim().startsWith(open[1])) end += 1;
      result.append(fence(lines.slice(at + 1, end).join("\n"), open[2]));
      at = end + 1;
    } else if (/^#{1,6}\s/.test(line)) {
      const level = Math.min(5, 2 + line.match(/^#+/)[0].length);
      result.append(make(`h${level}`, ...inline(line.replace(/^#+\s+/, ""))));
      at += 1;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      result.append(make("hr"));
      at += 1;
    } else if (BULLET.test(line)) {
      const [node, next] = list(lines, at);
      result.append(node);
      at = next;
    } else if (/^\s*>/.test(line)) {
      let end = at;
      while (end < lines.length && /^\s*>/.test(lines[end])) end += 1;
      result.append(make("blockquote", render(lines.slice(at, end).map((one) => one.replace(/^\s*>\s?/, "")).join("\n"))));
      at = end;
    } else if (line.includes("|") && at + 1 < lines.length && /^[\s|:-]*-[\s|:-]*$/.test(lines[at + 1]) && lines[at + 1].includes("|")) {
      const [node, next] = table(lines, at);
      result.append(node);
      at = next;
    } else if (!line.trim()) at += 1;
    else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !/^\s{0,3}(```|~~~|#{1,6}\s|>)/.test(lines[end]) && !BULLET.test(lines[end])) end += 1;
      const node = make("p");
      lines.slice(at, end).forEach((one, index) => node.append(...(index ? [make("br")] : []), ...inline(one)));
      result.append(node);
      at = end;
    }
  }
  return result;
}
