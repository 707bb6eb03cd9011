//! The last atom of a composition: what is done with the elements that are left. One table serves every domain; the kind of the
//! elements decides which rows apply.

use super::atoms::Kind::{Char, Entry, Int, Word};
use super::atoms::{Need, Terminal};

const BASE: Terminal = Terminal {
    id: "",
    phrases: &[],
    takes: &[],
    filter: Need::Maybe,
    map: Need::Maybe,
    ordered: true,
    expression: "",
    before: "",
    guard: "if {cond}:",
    step: "",
    after: "",
};

/// A terminal that asks about the elements themselves, so that mapping them first would be idle.
const QUESTION: Terminal = Terminal { filter: Need::Always, map: Need::Never, ..BASE };

/// A terminal whose loop collects the elements into `result` before it ends.
const COLLECT: Terminal = Terminal { before: "result = []", step: "result.append({e})", ..BASE };

pub const TERMINALS: &[Terminal] = &[
    Terminal {
        id: "sum",
        phrases: &["the sum of {items}", "the total of {items}"],
        takes: &[Int],
        ordered: false,
        expression: "return sum({gen})",
        before: "total = 0",
        step: "total += {e}",
        after: "return total",
        ..BASE
    },
    Terminal {
        id: "product",
        phrases: &["the product of {items}"],
        takes: &[Int],
        ordered: false,
        before: "result = 1",
        step: "result *= {e}",
        after: "return result",
        ..BASE
    },
    Terminal {
        id: "count",
        phrases: &["the number of {items}", "how many {nouns} {verb}"],
        takes: &[Int, Char, Word, Entry],
        ordered: false,
        expression: "return sum(1 for {v} in {source} if {cond})",
        before: "count = 0",
        step: "count += 1",
        after: "return count",
        ..QUESTION
    },
    Terminal {
        id: "largest",
        phrases: &["the largest of {items}, or None", "the maximum of {items}, or None"],
        takes: &[Int],
        ordered: false,
        expression: "return max({arg}, default=None)",
        before: "best = None",
        step: "if best is None or {e} > best:\n    best = {e}",
        after: "return best",
        ..BASE
    },
    Terminal {
        id: "smallest",
        phrases: &["the smallest of {items}, or None", "the minimum of {items}, or None"],
        takes: &[Int],
        ordered: false,
        expression: "return min({arg}, default=None)",
        before: "best = None",
        step: "if best is None or {e} < best:\n    best = {e}",
        after: "return best",
        ..BASE
    },
    Terminal {
        id: "longest",
        phrases: &["the longest of {items}, or None"],
        takes: &[Word],
        expression: "return max({arg}, key=len, default=None)",
        ..BASE
    },
    Terminal {
        id: "average",
        phrases: &["the average of {items}, or 0", "the mean of {items}, or 0"],
        takes: &[Int],
        ordered: false,
        expression: "kept = [{each}]\nreturn sum(kept) / len(kept) if kept else 0",
        before: "total = 0\ncount = 0",
        step: "total += {e}\ncount += 1",
        after: "return total / count if count else 0",
        ..BASE
    },
    Terminal {
        id: "list",
        phrases: &["a list of {items}", "the list of {items}"],
        takes: &[Int, Char, Word],
        expression: "return [{each}]",
        after: "return result",
        ..COLLECT
    },
    Terminal {
        id: "sorted",
        phrases: &["a sorted list of {items}", "the sorted list of {items}"],
        takes: &[Int, Char, Word],
        expression: "return sorted({gen})",
        after: "return sorted(result)",
        ..COLLECT
    },
    Terminal {
        id: "descending",
        phrases: &["a descending list of {items}", "the descending list of {items}"],
        takes: &[Int, Char, Word],
        expression: "return sorted({arg}, reverse=True)",
        after: "return sorted(result, reverse=True)",
        ..COLLECT
    },
    Terminal {
        id: "backwards",
        phrases: &["a reversed list of {items}", "the reversed list of {items}"],
        takes: &[Int, Char, Word],
        expression: "return [{each}][::-1]",
        after: "return result[::-1]",
        ..COLLECT
    },
    Terminal {
        id: "distinct",
        phrases: &["the number of distinct values of {items}", "how many distinct values are in {items}"],
        takes: &[Int, Char, Word],
        ordered: false,
        expression: "return len(set({gen}))",
        before: "seen = set()",
        step: "seen.add({e})",
        after: "return len(seen)",
        ..BASE
    },
    Terminal {
        id: "unique",
        phrases: &["a sorted list without duplicates of {items}", "the sorted distinct values of {items}"],
        takes: &[Int, Char, Word],
        ordered: false,
        expression: "return sorted(set({gen}))",
        before: "seen = set()",
        step: "seen.add({e})",
        after: "return sorted(seen)",
        ..BASE
    },
    Terminal {
        id: "first",
        phrases: &["the first of {items}, or None"],
        takes: &[Int, Char, Word],
        filter: Need::Always,
        expression: "return next(({each}), None)",
        step: "return {e}",
        after: "return None",
        ..BASE
    },
    Terminal {
        id: "last",
        phrases: &["the last of {items}, or None"],
        takes: &[Int, Char, Word],
        before: "result = None",
        step: "result = {e}",
        after: "return result",
        ..BASE
    },
    Terminal {
        id: "running",
        phrases: &["the running totals of {items}", "a list of the running sums of {items}"],
        takes: &[Int],
        before: "total = 0\nresult = []",
        step: "total += {e}\nresult.append(total)",
        after: "return result",
        ..BASE
    },
    Terminal {
        id: "counts",
        phrases: &["a dict that counts {items}", "a dict of how often each occurs of {items}"],
        takes: &[Int, Char, Word],
        before: "counts = {}",
        step: "counts[{e}] = counts.get({e}, 0) + 1",
        after: "return counts",
        ..BASE
    },
    Terminal {
        id: "lookup",
        phrases: &["a dict from {plain} to {each} {map}", "a dict with {plain} as keys and {each} {map} as value"],
        takes: &[Int, Char, Word],
        map: Need::Always,
        expression: "return {{x}: {e} for {v} in {source}{if}}",
        before: "result = {}",
        step: "result[{x}] = {e}",
        after: "return result",
        ..BASE
    },
    Terminal {
        id: "positions",
        phrases: &["the positions of {items}", "a list of the positions of {items}"],
        takes: &[Int, Char, Word],
        expression: "return [i for i, {v} in enumerate({whole}) if {cond}]",
        ..QUESTION
    },
    Terminal {
        id: "any",
        phrases: &["whether any {nouns} {verb}", "True if any {nouns} {verb}, otherwise False"],
        takes: &[Int, Char, Word, Entry],
        expression: "return any({cond} for {v} in {source})",
        step: "return True",
        after: "return False",
        ..QUESTION
    },
    Terminal {
        id: "all",
        phrases: &["whether all {nouns} {verb}", "True if all {nouns} {verb}, otherwise False"],
        takes: &[Int, Char, Word, Entry],
        expression: "return all({cond} for {v} in {source})",
        guard: "if not {cond}:",
        step: "return False",
        after: "return True",
        ..QUESTION
    },
    Terminal {
        id: "string",
        phrases: &["a string of {items}", "the string made of {items}"],
        takes: &[Char],
        expression: "return \"\".join({gen})",
        before: "result = \"\"",
        step: "result += {e}",
        after: "return result",
        ..BASE
    },
    Terminal {
        id: "mirror",
        phrases: &["a reversed string of {items}", "the reversed string made of {items}"],
        takes: &[Char],
        expression: "return \"\".join({gen})[::-1]",
        before: "result = \"\"",
        step: "result = {e} + result",
        after: "return result",
        ..BASE
    },
    Terminal {
        id: "spaces",
        phrases: &["a string that joins with spaces {items}"],
        takes: &[Word],
        expression: "return \" \".join({gen})",
        after: "return \" \".join(result)",
        ..COLLECT
    },
    Terminal {
        id: "dashes",
        phrases: &["a string that joins with dashes {items}"],
        takes: &[Char, Word],
        expression: "return \"-\".join({gen})",
        after: "return \"-\".join(result)",
        ..COLLECT
    },
    Terminal {
        id: "dict",
        phrases: &["a dict of {items}", "a new dict of {items}"],
        takes: &[Entry],
        expression: "return {{x}: {e} for {v} in {source}{if}}",
        before: "result = {}",
        step: "result[{x}] = {e}",
        after: "return result",
        ..BASE
    },
    Terminal {
        id: "swapped",
        phrases: &["a swapped dict of {items}", "a dict from values to keys of {items}"],
        takes: &[Entry],
        expression: "return {{e}: {x} for {v} in {source}{if}}",
        before: "result = {}",
        step: "result[{e}] = {x}",
        after: "return result",
        ..BASE
    },
];
