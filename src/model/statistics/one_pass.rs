//! Statistics of rows by one kernel, which reads each logit once (and again only to draw): for what most requests ask, the best or a drawn
//! token at any temperature, with tokens ruled out or biased. Filters, penalties, alternatives and drawn drafts are left to [`super::table`].

use std::collections::BTreeMap;

use super::table::Rows;
use super::{ModelError, Pick};
use crate::tensor::fused::{self, Fused};
use crate::tensor::{Tensor, upload};

/// The table of [`super::table::table`] in one pass, `[rows, columns]` in f64; `None` where it takes more than one.
pub(super) fn table(fused: &Fused, logits: &Tensor, rows: &Rows) -> Result<Option<Tensor>, ModelError> {
    let s = rows.sampling;
    let filtered = s.top_k.is_some() || s.top_p.is_some() || s.min_p.is_some();
    if filtered || s.alternatives > 0 || !rows.histories.is_empty() || rows.proposal.is_some() {
        return Ok(None);
    }
    let Some((pick, mut numbers)) = picked(&rows.picks) else { return Ok(None) };
    let edits = edits(rows);
    numbers.extend(edits.iter().flat_map(|(token, (added, unjudged))| [f64::from(*token), *added, f64::from(*unjudged)]));
    let drawn = if s.temperature > 0.0 { 1.0 / s.temperature } else { 1.0 };
    let numbers = if numbers.is_empty() { None } else { Some(upload(&numbers, logits.device())?) };
    let asked = fused::Rows {
        pick,
        numbers: numbers.as_ref(),
        edits: edits.len(),
        drawn,
        judged: if s.filtered_confidence { drawn } else { 1.0 },
        margin: s.margin,
        entropy: s.entropy,
    };
    Ok(fused.statistics(logits, &asked)?)
}

/// How all rows pick, and a number for each unless it is the best; `None` if they differ.
fn picked(picks: &[Pick]) -> Option<(fused::Pick, Vec<f64>)> {
    let numbers: Vec<(fused::Pick, f64)> = picks
        .iter()
        .map(|pick| match pick {
            Pick::Best => (fused::Pick::Best, 0.0),
            Pick::Given(token) => (fused::Pick::Given, f64::from(*token)),
            Pick::At(uniform) => (fused::Pick::Drawn, *uniform),
        })
        .collect();
    let (kind, _) = *numbers.first()?;
    let alike = numbers.iter().all(|(other, _)| *other == kind);
    let wanted = if kind == fused::Pick::Best { 0 } else { numbers.len() };
    alike.then(|| (kind, numbers.iter().take(wanted).map(|(_, number)| *number).collect()))
}

/// Tokens that are treated apart: what is added to their logits, and whether they have no part in confidence.
fn edits(rows: &Rows) -> BTreeMap<u32, (f64, bool)> {
    let mut edits: BTreeMap<u32, (f64, bool)> = BTreeMap::new();
    for (token, bias) in &rows.sampling.logit_bias {
        edits.entry(*token).or_default().0 += f64::from(*bias);
    }
    for token in &rows.sampling.forbidden {
        edits.entry(*token).or_default().0 = f64::NEG_INFINITY;
    }
    for token in &rows.sampling.unconfident {
        edits.entry(*token).or_default().1 = true;
    }
    edits
}
