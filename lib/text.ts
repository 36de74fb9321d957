/** What is in names.ts now; for rooms that have not moved yet. */
export { oneLine, ownLines, printable, quote, shellWord } from "./names.ts";
