/**
 * A small, safe subset of Markdown: text in, plain tree out, DOM nodes from the tree.
 *
 * Paragraphs, headings, lists, tables, fenced code, quotes, rules; bold, emphasis, code and
 * links. Everything reaches the page as text nodes, never as markup; links are http, https and
 * mailto alone. It is not CommonMark: what it does not know stays readable text. Each block
 * keeps its `source`, so that a growing answer redraws only its last block.
 */

const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.+?)\s*#*\s*$/;
const RULE = /^\s{0,3}([-*_])(?:\s*\1){2,}\s*$/;
const LIST_ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^\s{0,3}>\s?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;
const INLINE =
  /(`+)([^`][\s\S]*?)\1|\*\*(?=\S)([\s\S]*?\S)\*\*|(?<![\w*])\*(?=[^\s*])([\s\S]*?[^\s*])\*(?![\w*])|(?<!\w)_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)|\[([^\]\n]{1,400})\]\(([^()\s]{1,2000})\)|(https?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?])/;

/** Longer paragraphs are shown as they are: no pattern may take long on hostile text. */
const MAX_INLINE = 4_000;
const MAX_DEPTH = 6;

/**
 * @param {string} text
 * @returns {object[]} blocks, each `{type, source, …}`
 */
export function parseMarkdown(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  const take = (block, end) => {
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at += 1;
      continue;
    }
    const fence = FENCE.exec(line);
    if (fence) {
      take(...readFence(lines, at, fence));
      continue;
    }
    const heading = HEADING.exec(line);
    if (heading) {
      take({ type: "heading", level: heading[1].length, inlines: parseInlines(heading[2]) }, at + 1);
      continue;
    }
    if (RULE.test(line)) {
      take({ type: "rule" }, at + 1);
      continue;
    }
    if (isTable(lines, at)) {
      take(...readTable(lines, at));
      continue;
    }
    if (LIST_ITEM.test(line) && depth < MAX_DEPTH) {
      take(...readList(lines, at, depth));
      continue;
    }
    if (QUOTE.test(line) && depth < MAX_DEPTH) {
      let end = at;
      while (end < lines.length && QUOTE.test(lines[end])) end += 1;
      const inner = lines.slice(at, end).map((quoted) => QUOTE.exec(quoted)[1]);
      take({ type: "quote", blocks: parseMarkdown(inner.join("\n"), depth + 1) }, end);
      continue;
    }
    let end = at + 1;
    while (end < lines.length && !startsBlock(lines, end)) end += 1;
    const paragraph = lines.slice(at, end).map((part) => part.trim()).join("\n");
    take({ type: "paragraph", inlines: parseInlines(paragraph) }, end);
  }
  return blocks;
}

function startsBlock(lines, at) {
  const line = lines[at];
  return (
    !line.trim() ||
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    LIST_ITEM.test(line) ||
    QUOTE.test(line) ||
    isTable(lines, at)
  );
}

function readFence(lines, at, fence) {
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return [{ type: "code", language: fence[2], text: code }, Math.min(end + 1, lines.length)];
}

function isTable(lines, at) {
  return (
    lines[at].includes("|") &&
    at + 1 < lines.length &&
    lines[at + 1].includes("-") &&
    TABLE_RULE.test(lines[at + 1]) &&
    cells(lines[at]).length === cells(lines[at + 1]).length
  );
}

function cells(line) {
  let inner = line.trim();
  if (inner.startsWith("|")) inner = inner.slice(1);
  if (inner.endsWith("|") && !inner.endsWith("\\|")) inner = inner.slice(0, -1);
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readTable(lines, at) {
  const header = cells(lines[at]).map(parseInlines);
  const align = cells(lines[at + 1]).map((rule) =>
    rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "end") : "start",
  );
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim()) {
    const row = cells(lines[end]).slice(0, header.length).map(parseInlines);
    while (row.length < header.length) row.push([]);
    rows.push(row);
    end += 1;
  }
  return [{ type: "table", header, align, rows }, end];
}

function readList(lines, at, depth) {
  const first = LIST_ITEM.exec(lines[at]);
  const indent = first[1].length;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = LIST_ITEM.exec(lines[end]);
    if (item && item[1].length <= indent + 1 && item[1].length >= indent) {
      if (/\d/.test(item[2]) !== ordered) break;
      items.push([item[3]]);
    } else if (lines[end].trim() && /^\s/.test(lines[end]) && items.length) {
      items[items.length - 1].push(lines[end].slice(Math.min(indent + 2, leading(lines[end]))));
    } else {
      break;
    }
    end += 1;
  }
  return [
    {
      type: "list",
      ordered,
      start: ordered ? Number.parseInt(first[2], 10) : 1,
      items: items.map((item) => parseMarkdown(item.join("\n"), depth + 1)),
    },
    end,
  ];
}

function leading(line) {
  return line.length - line.trimStart().length;
}

/** @returns {object[]} `{type: "text"|"code"|"strong"|"emphasis"|"link"|"break", …}` */
export function parseInlines(text, depth = 0) {
  const inlines = [];
  const plain = (part) => {
    part.split("\n").forEach((line, index) => {
      if (index) inlines.push({ type: "break" });
      if (line) inlines.push({ type: "text", text: line });
    });
  };
  let rest = text;
  if (text.length > MAX_INLINE || depth > MAX_DEPTH) {
    plain(text);
    return inlines;
  }
  while (rest) {
    const match = INLINE.exec(rest);
    if (!match) break;
    plain(rest.slice(0, match.index));
    const [whole, , code, strong, star, underscore, label, target, bare] = match;
    if (code !== undefined) inlines.push({ type: "code", text: code });
    else if (strong !== undefined) {
      inlines.push({ type: "strong", inlines: parseInlines(strong, depth + 1) });
    } else if (star !== undefined || underscore !== undefined) {
      inlines.push({ type: "emphasis", inlines: parseInlines(star ?? underscore, depth + 1) });
    } else if (label !== undefined && SAFE_LINK.test(target)) {
      inlines.push({ type: "link", href: target, inlines: parseInlines(label, depth + 1) });
    } else if (bare !== undefined) {
      inlines.push({ type: "link", href: bare, inlines: [{ type: "text", text: bare }] });
    } else plain(whole);
    rest = rest.slice(match.index + whole.length);
  }
  plain(rest);
  return inlines;
}

/** Brings `element` to show `text`; blocks that did not change keep their nodes. */
export function updateMarkdown(element, text) {
  const blocks = parseMarkdown(text);
  const shown = element.stewardSources ?? [];
  let same = 0;
  while (same < blocks.length && same < shown.length && blocks[same].source === shown[same]) {
    same += 1;
  }
  while (element.childNodes.length > same) element.lastChild.remove();
  for (const block of blocks.slice(same)) element.append(blockNode(block));
  element.stewardSources = blocks.map((block) => block.source);
}

function blockNode(block) {
  switch (block.type) {
    case "heading":
      return node(`h${Math.min(block.level + 2, 6)}`, inlineNodes(block.inlines));
    case "code": {
      const pre = node("pre", [node("code", [block.text])]);
      pre.tabIndex = 0;
      if (block.language) pre.dataset.language = block.language;
      return pre;
    }
    case "rule":
      return node("hr", []);
    case "quote":
      return node("blockquote", block.blocks.map(blockNode));
    case "list": {
      const list = node(block.ordered ? "ol" : "ul", block.items.map(itemNode));
      if (block.ordered && block.start !== 1) list.start = block.start;
      return list;
    }
    case "table":
      return tableNode(block);
    default:
      return node("p", inlineNodes(block.inlines));
  }
}

function itemNode(blocks) {
  const [first, ...rest] = blocks;
  const tight = first?.type === "paragraph" ? inlineNodes(first.inlines) : first ? [blockNode(first)] : [];
  return node("li", [...tight, ...rest.map(blockNode)]);
}

function tableNode(block) {
  const row = (tag, inlines, index) => {
    const cell = node(tag, inlineNodes(inlines));
    cell.dataset.align = block.align[index] ?? "start";
    return cell;
  };
  const head = node("thead", [node("tr", block.header.map((cell, i) => row("th", cell, i)))]);
  const body = node(
    "tbody",
    block.rows.map((cellsOfRow) => node("tr", cellsOfRow.map((cell, i) => row("td", cell, i)))),
  );
  const frame = node("div", [node("table", [head, body])]);
  frame.className = "table-frame";
  frame.tabIndex = 0;
  return frame;
}

function inlineNodes(inlines) {
  return inlines.map((inline) => {
    switch (inline.type) {
      case "code":
        return node("code", [inline.text]);
      case "strong":
        return node("strong", inlineNodes(inline.inlines));
      case "emphasis":
        return node("em", inlineNodes(inline.inlines));
      case "break":
        return node("br", []);
      case "link": {
        const link = node("a", inlineNodes(inline.inlines));
        link.href = inline.href;
        link.target = "_blank";
        link.rel = "noopener noreferrer";
        return link;
      }
      default:
        return inline.text;
    }
  });
}

function node(tag, children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}
