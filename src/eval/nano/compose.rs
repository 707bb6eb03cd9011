//! Puts atoms together: which combinations exist, how one is worded, and the one body that the wording stands for.

use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};

use super::Draft;
use super::atoms::{Domain, Filter, Kind, Literal, Map, Style, Terminal};
use super::domains::DOMAINS;
use super::pieces::pieces;
use super::terminals::TERMINALS;

/// The most pieces a body may have, so that one canvas of a fixed size holds any.
const LONGEST_BODY: usize = 44;

/// The letters that wording and code may name; few, so that each is seen often.
pub const LETTERS: &[&str] = &["a", "e", "i", "n", "o", "r", "s", "t"];

/// One way to combine the atoms of a domain; names, literals and wording are still open.
#[derive(Clone, Copy, Debug)]
pub struct Pipeline {
    pub domain: &'static Domain,
    pub filter: Option<&'static Filter>,
    pub map: Option<&'static Map>,
    pub terminal: &'static Terminal,
    pub style: Style,
}

impl Pipeline {
    /// Every combination that makes sense, thinned as the domain asks.
    pub fn all() -> Vec<Pipeline> {
        let mut found = Vec::new();
        for domain in DOMAINS {
            let filters = || std::iter::once(None).chain(domain.filters.iter().flat_map(|table| table.iter()).map(Some));
            let maps = || std::iter::once(None).chain(domain.maps.iter().map(Some));
            for filter in filters() {
                for map in maps() {
                    for terminal in TERMINALS {
                        for &style in domain.loops {
                            let pipeline = Pipeline { domain, filter, map, terminal, style };
                            if pipeline.is_sensible() && pipeline.is_kept() {
                                found.push(pipeline);
                            }
                        }
                    }
                }
            }
        }
        found
    }

    pub fn key(&self) -> String {
        let filter = self.filter.map_or("all", |filter| filter.id);
        let map = self.map.map_or("same", |map| map.id);
        format!("{}/{}/{}/{}/{}", self.domain.id, filter, map, self.terminal.id, self.style.id())
    }

    fn is_sensible(&self) -> bool {
        let kind = match self.map {
            Some(map) if self.domain.kind != Kind::Entry => map.kind,
            _ => self.domain.kind,
        };
        self.terminal.takes.contains(&kind)
            && self.terminal.filter.allows(self.filter.is_some())
            && self.terminal.map.allows(self.map.is_some())
            && match self.style {
                Style::Expression => !self.terminal.expression.is_empty(),
                Style::For => !self.terminal.after.is_empty(),
                Style::While => !self.terminal.after.is_empty() && !self.terminal.ordered,
            }
            // Positions count what the collection itself yields.
            && (self.terminal.id != "positions" || self.domain.source == self.domain.whole)
            && self.is_short()
    }

    /// Whether the body fits; names and literals are one piece each, whatever they are.
    fn is_short(&self) -> bool {
        let body = self.body().replace("{p}", "n").replace("{k}", "9").replace("{m}", "9");
        pieces(&body).len() <= LONGEST_BODY
    }

    fn is_kept(&self) -> bool {
        let thin = if self.filter.is_some() && self.map.is_some() { self.domain.thin } else { self.domain.thin.div_ceil(12) };
        (super::hash(&self.key()) >> 32).is_multiple_of(thin)
    }

    /// Draws names, literals and wording.
    pub fn draft(&self, rng: &mut impl Rng) -> Draft {
        let domain = self.domain;
        let parameter = pick(rng, domain.parameters);
        let k = literal(rng, self.filter.map_or(Literal::None, |filter| filter.literal));
        let m = literal(rng, self.map.map_or(Literal::None, |map| map.literal));
        let fill = |template: &str| template.replace("{p}", parameter).replace("{k}", &k).replace("{m}", &m);

        let nouns = fill(pick(rng, domain.nouns));
        let verb = self.filter.map_or(String::new(), |filter| fill(pick(rng, filter.verbs)));
        let plain = if self.filter.is_some() { format!("the {nouns} that {verb}") } else { format!("the {nouns}") };
        let mapping = self.map.map_or(String::new(), |map| fill(pick(rng, map.phrases)));
        let items = if self.map.is_some() { format!("{plain}, {} {mapping}", domain.each) } else { plain.clone() };
        let phrase = pick(rng, self.terminal.phrases)
            .replace("{items}", &items)
            .replace("{plain}", &plain)
            .replace("{nouns}", &nouns)
            .replace("{verb}", &verb)
            .replace("{each}", domain.each)
            .replace("{map}", &mapping);
        let sentence = fill(pick(rng, self.style.frames())).replace("{t}", &phrase);

        let literals = [k.as_str(), m.as_str()].iter().filter_map(|text| text.parse().ok()).collect();
        let letter = LETTERS.iter().find(|letter| **letter == k).copied();
        Draft { sentence, parameters: parameter.to_string(), body: fill(&self.body()), shape: domain.shape, literals, letter }
    }

    /// The body with only the parameter and the literals left open.
    fn body(&self) -> String {
        let element = self.domain.element;
        let condition = self.filter.map_or(String::new(), |filter| filter.code.replace("{x}", element));
        let mapped = self.map.map_or(self.domain.mapped.to_string(), |map| map.code.replace("{x}", self.domain.mapped));
        let test = if condition.is_empty() { String::new() } else { format!(" if {condition}") };
        let each = format!("{mapped} for {} in {}{test}", self.domain.variables, self.domain.source);
        let gathered = if self.filter.is_none() && self.map.is_none() { self.domain.whole } else { &each };
        let argument = if gathered == each { format!("({each})") } else { gathered.to_string() };
        let fill = |template: &str| {
            template
                .replace("{arg}", &argument)
                .replace("{gen}", gathered)
                .replace("{each}", &each)
                .replace("{cond}", &condition)
                .replace("{if}", &test)
                .replace("{e}", &mapped)
                .replace("{x}", element)
                .replace("{v}", self.domain.variables)
                .replace("{source}", self.domain.source)
                .replace("{whole}", self.domain.whole)
        };
        let terminal = self.terminal;
        if self.style == Style::Expression {
            return indent(&fill(terminal.expression), 1);
        }
        let mut lines = indent(&fill(terminal.before), 1);
        match self.style {
            Style::While => lines += &indent(&format!("while {{p}} > 0:\n    {element} = {{p}} % 10\n    {{p}} //= 10"), 1),
            _ => lines += &indent(&format!("for {} in {}:", self.domain.variables, self.domain.source), 1),
        }
        if !condition.is_empty() {
            lines += &indent(&fill(terminal.guard), 2);
        }
        lines += &indent(&fill(terminal.step), if condition.is_empty() { 2 } else { 3 });
        lines + &indent(&fill(terminal.after), 1)
    }
}

/// Every line one level deeper by `levels`, each ended by a newline.
pub fn indent(text: &str, levels: usize) -> String {
    text.lines().map(|line| format!("{}{line}\n", "    ".repeat(levels))).collect()
}

/// A random row of a table.
///
/// # Panics
/// On an empty table, which would be a mistake in this module's own tables.
pub fn pick<T: Copy>(rng: &mut impl Rng, table: &[T]) -> T {
    *table.choose(rng).expect("tables of atoms are not empty")
}

/// A literal as it reads in both the comment and the code; empty where the atom has none.
pub fn literal(rng: &mut impl Rng, literal: Literal) -> String {
    match literal {
        Literal::None => String::new(),
        Literal::Number(low, high) => rng.random_range(low..=high).to_string(),
        Literal::Letter => pick(rng, LETTERS).to_string(),
    }
}
