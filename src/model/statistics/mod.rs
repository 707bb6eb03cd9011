//! From logits to what decoding needs: chosen token, confidence, margin and entropy of each wanted row.
//!
//! On the CPU each `row` is done by itself, by kernels of our own; elsewhere rows that are asked the same get a table on the device, by a
//! kernel in `one_pass` where they ask for no more than that knows, else by libtorch (`table`), and all tables of a forward are copied at once. None
//! makes an f32 copy of all logits (guidance, which mixes two sets of logits first, does). Sums of probabilities are taken in f64: two confidences of 1 − 10⁻⁹ and 1 − 10⁻⁸ must not tie.

mod one_pass;
mod row;
mod table;

use std::borrow::Cow;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use self::table::{Columns, Rows};
use super::ModelError;
use crate::decode::{Noise, RowStatistics, Sampling};
use crate::tensor::fused::Fused;
use crate::tensor::{Device, Tensor, download, kernels};

/// A token that has occurred: `(token, occurrences in the prompt, occurrences since)`.
pub type History = (u32, u32, u32);

/// Draws that a drafter made and the network verifies: row `i` of the logits judges token `i`.
#[derive(Debug)]
pub struct Proposal {
    pub tokens: Vec<u32>,
    /// What each was drawn from, `[tokens, vocab]`, f32.
    pub probabilities: Tensor,
    /// One number from 0 to 1 for each, independent of everything else: whether it is accepted.
    pub uniforms: Vec<f64>,
}

/// What a row depends on besides its logits.
#[derive(Clone, Copy, Debug)]
pub struct Conditions<'a> {
    pub sampling: &'a Sampling,
    pub noise: &'a Noise,
    /// As in [`crate::decode::Window::histories`].
    pub histories: &'a [Vec<History>],
    pub proposal: Option<&'a Proposal>,
}

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug)]
enum Pick {
    Best,
    Given(u32),
    /// Where this number from 0 to 1 falls in the cumulated distribution.
    At(f64),
}

impl<'a> Conditions<'a> {
    fn picks(&self, rows: usize) -> Result<Vec<Pick>, ModelError> {
        let picks: Vec<Pick> = match self.noise {
            Noise::Given(tokens) => tokens.iter().take(rows).map(|token| Pick::Given(*token)).collect(),
            _ if self.sampling.temperature == 0.0 => vec![Pick::Best; rows],
            noise => uniforms(noise, rows).iter().take(rows).map(|uniform| Pick::At(*uniform)).collect(),
        };
        if picks.len() < rows {
            return Err(ModelError::Torch(format!("{} numbers were given to choose the tokens of {rows} rows", picks.len())));
        }
        Ok(picks)
    }

    /// One for each row where penalties ask, else none.
    fn histories(&self, rows: usize) -> &'a [Vec<History>] {
        match self.histories.get(..rows) {
            Some(histories) if self.sampling.penalties.any() => histories,
            _ => &[],
        }
    }

    /// Whether rows under these conditions and those under others can be in one table.
    fn alike(&self, other: &Self) -> bool {
        let chance = std::mem::discriminant(self.noise) == std::mem::discriminant(other.noise);
        let free = self.proposal.is_none() && other.proposal.is_none();
        free && chance && self.sampling == other.sampling && self.histories.is_empty() == other.histories.is_empty()
    }
}

/// One number from 0 to 1 for each row.
fn uniforms(noise: &Noise, rows: usize) -> Cow<'_, [f64]> {
    match noise {
        Noise::Uniforms(uniforms) => Cow::Borrowed(uniforms),
        Noise::Seed(seed) => {
            let mut rng = ChaCha8Rng::seed_from_u64(*seed);
            (0..rows).map(|_| rng.random::<f64>()).collect()
        }
        Noise::Given(_) => Cow::Borrowed(&[]),
    }
}

/// Statistics of `logits: [rows, vocab]`, in order.
pub fn statistics(logits: &Tensor, conditions: &Conditions) -> Result<Vec<RowStatistics>, ModelError> {
    let mut ledger = Ledger::new(Fused::on(logits.device()));
    ledger.add(logits, &[Part { index: 0, at: 0, rows: logits.size2()?.0 as usize, conditions: *conditions }])?;
    ledger.read()?.pop().map_or(Ok(vec![]), |(_, rows)| rows)
}

/// Some of a tensor's rows, which one window wants to know about.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The window's.
    pub index: usize,
    /// Place of the first row.
    pub at: usize,
    pub rows: usize,
    pub conditions: Conditions<'a>,
}

/// The statistics of a forward's windows, on their way from the device.
#[derive(Default)]
pub struct Ledger {
    known: Vec<(usize, Vec<RowStatistics>)>,
    /// Windows that share a table, with how many rows each has.
    shared: Vec<(Vec<(usize, usize)>, Columns)>,
    tables: Vec<Tensor>,
    fused: Option<&'static Fused>,
}

impl Ledger {
    /// With what the device has to make tables in one pass.
    pub fn new(fused: Option<&'static Fused>) -> Self {
        Self { fused, ..Self::default() }
    }

    /// Takes the statistics of these parts of `logits: [rows, vocab]`.
    pub fn add(&mut self, logits: &Tensor, parts: &[Part]) -> Result<(), ModelError> {
        let own = |part: &Part| part.conditions.proposal.is_none();
        for run in parts.chunk_by(|a, b| a.at + a.rows == b.at && own(a) == own(b)) {
            let (Some(first), rows) = (run.first(), run.iter().map(|part| part.rows).sum::<usize>()) else { continue };
            let found = match own(first) {
                false => None,
                true if logits.size().first() == Some(&(rows as i64)) => rows_apart(logits, run)?,
                true => rows_apart(&logits.f_narrow(0, first.at as i64, rows as i64)?, run)?,
            };
            match found {
                Some(found) => self.known.extend(found),
                None => {
                    for together in run.chunk_by(|a, b| a.conditions.alike(&b.conditions)) {
                        self.add_table(logits, together)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Parts that lie side by side and are asked the same.
    fn add_table(&mut self, logits: &Tensor, parts: &[Part]) -> Result<(), ModelError> {
        let [Part { at, conditions, .. }, ..] = parts else { return Ok(()) };
        let (mut picks, mut histories) = (vec![], vec![]);
        for part in parts {
            picks.extend(part.conditions.picks(part.rows)?);
            histories.extend(part.conditions.histories(part.rows).iter().map(Vec::as_slice));
        }
        let logits = logits.f_narrow(0, *at as i64, picks.len() as i64)?;
        if picks.is_empty() {
            self.known.extend(parts.iter().map(|part| (part.index, vec![])));
            return Ok(());
        }
        let rows = Rows { sampling: conditions.sampling, picks, histories, proposal: conditions.proposal };
        let made = self.fused.map_or(Ok(None), |fused| one_pass::table(fused, &logits, &rows))?;
        self.tables.push(made.map_or_else(|| table::table(&logits, &rows), Ok)?.f_view(-1)?);
        let columns = Columns::of(conditions.sampling, logits.size()[1]);
        self.shared.push((parts.iter().map(|part| (part.index, part.rows)).collect(), columns));
        Ok(())
    }

    /// Each window's statistics, in no order: one copy from the device for all. Numbers that are not finite are an error of their window.
    pub fn read(self) -> Result<Vec<Known<Checked>>, ModelError> {
        let mut found = self.known;
        if !self.tables.is_empty() {
            let numbers = download(&Tensor::f_cat(&self.tables, 0)?)?;
            let mut left = numbers.as_slice();
            for (windows, columns) in self.shared {
                for (index, rows) in windows {
                    let (mine, rest) = left.split_at(rows * columns.count());
                    left = rest;
                    found.push((index, mine.chunks(columns.count()).map(|row| columns.read(row)).collect()));
                }
            }
        }
        let checked = |rows: Vec<RowStatistics>| match rows.iter().all(|row| row.confidence.is_finite()) {
            true => Ok(rows),
            false => Err(ModelError::NotFinite),
        };
        Ok(found.into_iter().map(|(index, rows)| (index, checked(rows))).collect())
    }
}

/// Something of the window of this index.
pub type Known<T> = (usize, T);

/// A window's statistics, unless one of them is no number.
pub type Checked = Result<Vec<RowStatistics>, ModelError>;

/// Each row by itself, where our kernels run. `parts` are those of the logits, side by side.
fn rows_apart(logits: &Tensor, parts: &[Part]) -> Result<Option<Vec<Known<Vec<RowStatistics>>>>, ModelError> {
    if !kernels::in_use() || logits.device() != Device::Cpu {
        return Ok(None);
    }
    let mut asked: Vec<(&Sampling, Pick, &[History])> = vec![];
    for Part { rows, conditions, .. } in parts {
        let histories = conditions.histories(*rows);
        let history = |row: usize| histories.get(row).map_or(&[][..], Vec::as_slice);
        asked.extend(
            conditions.picks(*rows)?.into_iter().enumerate().map(|(row, pick)| (conditions.sampling, pick, history(row))),
        );
    }
    let one = |at: usize, logits: &mut [f32]| {
        let (sampling, pick, history) = asked[at];
        row::row(logits, sampling, pick, history)
    };
    let Some(found) = kernels::rows::each(logits, one)? else { return Ok(None) };
    let mut found = found.into_iter();
    Ok(Some(parts.iter().map(|part| (part.index, found.by_ref().take(part.rows).collect())).collect()))
}

#[cfg(test)]
mod tests;
