//! What lanes came to: a line for each, of one prompt's figures or of the medians over many, and the object that scripts read.

use console::measure_text_width;
use serde_json::{Value, json};

use super::Outcome;
use super::prompts::Task;
use crate::cli::{outcome, remote};
use crate::service::proto::{LaneError, LaneSummary, Model, Usage};

/// A column of figures. Where no lane has one, it is left out.
struct Column {
    heading: &'static str,
    decimals: usize,
    value: fn(&LaneSummary) -> Option<f64>,
    /// Over many prompts: the mean, as of yes and no, rather than the median.
    mean: bool,
}

const fn median(heading: &'static str, decimals: usize, value: fn(&LaneSummary) -> Option<f64>) -> Column {
    Column { heading, decimals, value, mean: false }
}

fn usage(summary: &LaneSummary) -> Option<&Usage> {
    summary.usage.as_ref()
}

const COLUMNS: [Column; 13] = [
    median("tokens", 0, |lane| Some(usage(lane)?.generated_tokens as f64)),
    median("forwards", 0, |lane| {
        let forwards = usage(lane)?.forwards?;
        Some((forwards.prefill + forwards.denoise + forwards.cache_store + forwards.decode + forwards.verify) as f64)
    }),
    median("tok/fwd", 2, |lane| Some(usage(lane)?.tokens_per_forward)),
    median("accept", 2, |lane| usage(lane)?.speculation.as_ref().filter(|s| s.drafts > 0).map(|s| s.acceptance_length)),
    median("guess ms", 1, |lane| Some(1e3 * usage(lane)?.first_provisional_seconds?)),
    median("commit ms", 1, |lane| Some(1e3 * usage(lane)?.first_committed_seconds?)),
    median("all ms", 1, |lane| Some(1e3 * usage(lane)?.decoding_seconds)),
    median("tok/s", 0, |lane| Some(usage(lane)?.decoding_tokens_per_second)),
    median("end to end", 0, |lane| Some(usage(lane)?.end_to_end_tokens_per_second)),
    median("nats", 3, |lane| Some(lane.likelihood.as_ref()?.negative_log_likelihood)),
    median("nats/tok", 4, |lane| lane.likelihood.as_ref()?.negative_log_likelihood_per_token),
    Column {
        heading: "exact",
        decimals: 2,
        value: |lane| Some(if lane.reference_match?.exact { 1.0 } else { 0.0 }),
        mean: true,
    },
    median("edit", 3, |lane| Some(lane.reference_match?.normalized_edit_distance)),
];

/// The table of all prompts' outcomes, each with the same lanes. What went wrong stands below it.
pub fn lines(all: &[Vec<Outcome>]) -> Vec<String> {
    let Some(first) = all.first() else { return vec![] };
    let lanes: Vec<Vec<&LaneSummary>> =
        (0..first.len()).map(|lane| all.iter().filter_map(|outcomes| Some(&outcomes.get(lane)?.summary)).collect()).collect();
    let figures: Vec<Vec<Option<f64>>> =
        lanes.iter().map(|lane| COLUMNS.iter().map(|column| figure(column, lane)).collect()).collect();
    let used: Vec<usize> = (0..COLUMNS.len()).filter(|at| figures.iter().any(|lane| lane[*at].is_some())).collect();
    let heading = ["lane"].into_iter().map(str::to_owned).chain(used.iter().map(|at| COLUMNS[*at].heading.to_owned()));
    let mut rows: Vec<Vec<String>> = vec![heading.collect()];
    for (lane, figures) in lanes.iter().zip(&figures) {
        let shown =
            |at: &usize| figures[*at].map_or_else(|| "-".into(), |figure| format!("{figure:.*}", COLUMNS[*at].decimals));
        let name = lane.first().map(|lane| lane.name.clone()).unwrap_or_default();
        rows.push([name].into_iter().chain(used.iter().map(shown)).collect());
    }
    let mut lines = aligned(&rows);
    if all.len() > 1 {
        lines.insert(0, format!("medians of {} prompts (exact: the share)", all.len()));
    }
    for lane in &lanes {
        lines.extend(troubles(lane));
    }
    lines
}

/// How often a lane failed or was not judged, and why it first was so.
fn troubles(lane: &[&LaneSummary]) -> Vec<String> {
    let told = |what: &str, of: fn(&LaneSummary) -> Option<&LaneError>| {
        let errors: Vec<&LaneError> = lane.iter().filter_map(|summary| of(summary)).collect();
        let first = errors.first()?;
        let times = if lane.len() > 1 { format!(" {} of {} times", errors.len(), lane.len()) } else { String::new() };
        Some(format!("{} {what}{times}: {}", lane.first()?.name, first.message))
    };
    [told("failed", |lane| lane.error.as_ref()), told("was not judged", |lane| lane.judge_error.as_ref())]
        .into_iter()
        .flatten()
        .collect()
}

fn figure(column: &Column, lane: &[&LaneSummary]) -> Option<f64> {
    let mut values: Vec<f64> = lane.iter().filter_map(|summary| (column.value)(summary)).collect();
    if values.is_empty() {
        return None;
    }
    if column.mean {
        return Some(values.iter().sum::<f64>() / values.len() as f64);
    }
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    Some(if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 })
}

/// The first column to the left, the others to the right.
fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> =
        (0..columns).map(|at| rows.iter().map(|row| measure_text_width(&row[at])).max().unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(at, (cell, width))| {
            let room = " ".repeat(width - measure_text_width(cell));
            if at == 0 { format!("{cell}{room}") } else { format!("{room}{cell}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// One prompt's comparison, for `--json`.
pub fn object(task: &Task, outcomes: &[Outcome], models: &[Model], racing: bool) -> Value {
    let model = |model: &Model| json!({"name": model.name, "dtype": model.dtype, "quantization": model.quantization, "device": model.device, "threads": model.threads});
    json!({
        "prompt": task.prompt,
        "reference": task.reference,
        "order": if racing { "racing" } else { "in_turn" },
        "models": models.iter().map(model).collect::<Vec<_>>(),
        "lanes": outcomes.iter().map(lane).collect::<Vec<_>>(),
    })
}

fn lane(outcome: &Outcome) -> Value {
    let summary = &outcome.summary;
    let error = |error: &LaneError| json!({"code": tonic::Code::from(error.code).description(), "message": error.message});
    json!({
        "name": summary.name,
        "model": summary.model,
        "text": summary.text,
        "seed": outcome.seed,
        "finish_reason": summary.usage.as_ref().and_then(|_| remote::reason(summary.reason())).map(outcome::reason_name),
        "usage": summary.usage.clone().map(usage_object),
        "likelihood": summary.likelihood.as_ref().map(|found| json!({
            "judge": found.model,
            "tokens": found.tokens,
            "negative_log_likelihood": found.negative_log_likelihood,
            "negative_log_likelihood_per_token": found.negative_log_likelihood_per_token,
        })),
        "reference_match": summary.reference_match.map(|found| json!({
            "exact": found.exact,
            "edit_distance": found.edit_distance,
            "normalized_edit_distance": found.normalized_edit_distance,
        })),
        "error": summary.error.as_ref().map(error),
        "judge_error": summary.judge_error.as_ref().map(error),
    })
}

/// As `generate --json` has it. The time to prepare the request, which it does not know, is told and counted too.
fn usage_object(usage: Usage) -> Value {
    let (preparing, rate) = (usage.preparing_seconds, usage.end_to_end_tokens_per_second);
    let mut object = outcome::usage_object(&remote::usage(usage));
    object["preparing_seconds"] = preparing.into();
    object["tokens_per_second_end_to_end"] = rate.into();
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::proto::{Likelihood, ReferenceMatch};

    fn outcome(tokens: u64, rate: f64, exact: Option<bool>) -> Outcome {
        let usage = Usage { generated_tokens: tokens, decoding_tokens_per_second: rate, ..Usage::default() };
        let reference_match = exact.map(|exact| ReferenceMatch { exact, ..ReferenceMatch::default() });
        Outcome {
            summary: LaneSummary { name: "one".into(), usage: Some(usage), reference_match, ..LaneSummary::default() },
            seed: 0,
        }
    }

    fn failed() -> Outcome {
        let error = Some(LaneError { code: 8, message: "no room".into() });
        Outcome { summary: LaneSummary { name: "longer".into(), error, ..LaneSummary::default() }, seed: 0 }
    }

    /// The words of a line.
    fn words(line: &str) -> Vec<&str> {
        line.split_whitespace().collect()
    }

    #[test]
    fn columns_without_a_figure_are_left_out() {
        let lines = lines(&[vec![outcome(7, 123.4, None), failed()]]);
        let heading = "lane    tokens  tok/fwd  all ms  tok/s  end to end";
        assert_eq!(lines[0], heading);
        assert_eq!(words(&lines[1]), ["one", "7", "0.00", "0.0", "123", "0"]);
        assert_eq!(words(&lines[2]), ["longer", "-", "-", "-", "-", "-"]);
        assert!(lines[1..3].iter().all(|line| line.len() == heading.len()));
        assert_eq!(lines[3], "longer failed: no room");
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn many_prompts_are_told_by_medians() {
        let mut all: Vec<Vec<Outcome>> =
            [(4, 10.0, true), (9, 30.0, false), (5, 1000.0, false)].map(|(n, r, e)| vec![outcome(n, r, Some(e))]).into();
        all[1][0].summary.likelihood = Some(Likelihood { negative_log_likelihood: 2.5, ..Likelihood::default() });
        all[2][0].summary.judge_error = Some(LaneError { code: 8, message: "busy".into() });
        let told = lines(&all);
        assert_eq!(told[0], "medians of 3 prompts (exact: the share)");
        assert_eq!(words(&told[2]), ["one", "5", "0.00", "0.0", "30", "0", "2.500", "0.33", "0.000"]);
        assert_eq!(told[3], "one was not judged 1 of 3 times: busy");
        all.pop();
        assert_eq!(words(&lines(&all)[2])[1], "6", "of two, what lies between them (6.5, to even)");
    }
}
