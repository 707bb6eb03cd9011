//! What a generation has cost, as the one object that scripts read and the one line that people do.

use serde_json::{Value, json};

use crate::decode::FinishReason;
use crate::decode::autoregressive::Speculation;
use crate::engine::Usage;

/// The whole outcome, for `--json`.
pub fn outcome(text: &str, token_ids: &[u32], reason: FinishReason, usage: &Usage, seed: u64) -> Value {
    json!({
        "text": text,
        "token_ids": token_ids,
        "finish_reason": reason_name(reason),
        "seed": seed,
        "usage": usage_object(usage),
    })
}

/// Forwards of kinds that no path takes yet are there as zeros, so that readers need not change when one does.
pub fn usage_object(usage: &Usage) -> Value {
    let decoding = usage.decoding.as_secs_f64();
    let forwards = &usage.forwards;
    let speculation = usage.speculation.as_ref().map(|found| speculation_object(found, usage));
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "generated_tokens": usage.generated_tokens,
        "forwards": {
            "prefill": forwards.prefill, "denoise": forwards.denoise, "cache_store": 0, "decode": forwards.decode,
            "verify": forwards.verify, "draft": forwards.draft,
        },
        "steps": usage.steps,
        "tokens_per_forward": ratio(usage.generated_tokens, forwards.model() as f64),
        "queued_seconds": usage.queued.as_secs_f64(),
        "seconds_to_first_provisional": usage.time_to_first_provisional.map(|time| time.as_secs_f64()),
        "seconds_to_first_commit": usage.time_to_first_commit.map(|time| time.as_secs_f64()),
        "decoding_seconds": decoding,
        "tokens_per_second": ratio(usage.generated_tokens, decoding),
        "tokens_per_second_end_to_end": ratio(usage.generated_tokens, decoding + usage.queued.as_secs_f64()),
        "speculation": speculation,
    })
}

/// What drafting came to.
pub fn speculation_object(found: &Speculation, usage: &Usage) -> Value {
    json!({
        "drafts": found.drafts,
        "candidate_tokens": found.candidates,
        "drafted_tokens": found.drafted,
        "accepted_tokens": found.accepted,
        "acceptance_length": found.acceptance_length(),
        "acceptance_by_position": found.acceptance_by_position(),
        "accepted_exactly": found.accepted_exactly,
        "deduplicated_share": ratio(found.candidates.saturating_sub(found.drafted), found.candidates as f64),
        "draft_seconds": usage.drafting.as_secs_f64(),
        "verify_seconds": usage.verifying.as_secs_f64(),
        "commit_seconds": usage.committing.as_secs_f64(),
        "estimated_speedup": usage.estimated_speedup(),
    })
}

/// One line for people.
pub fn usage_line(reason: FinishReason, usage: &Usage) -> String {
    let decoding = usage.decoding.as_secs_f64();
    let first =
        usage.time_to_first_commit.map_or(String::new(), |time| format!(", first after {}", seconds(time.as_secs_f64())));
    let drafts = usage.speculation.as_ref().filter(|found| found.drafts > 0);
    let drafts = drafts.map_or(String::new(), |found| format!(", acceptance length {:.2}", found.acceptance_length()));
    format!(
        "{} tokens in {} steps, {} forwards ({:.1} tokens each), {} ({:.0} tokens/s{first}){drafts}, finished by {}",
        usage.generated_tokens,
        usage.steps,
        usage.forwards.model(),
        ratio(usage.generated_tokens, usage.forwards.model() as f64),
        seconds(decoding),
        ratio(usage.generated_tokens, decoding),
        reason_name(reason),
    )
}

pub fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

pub fn seconds(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

/// A canvas without holes takes no forward and no time; its ratios are 0, since JSON has no NaN.
fn ratio(count: usize, of: f64) -> f64 {
    if of > 0.0 { count as f64 / of } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::Forwards;

    #[test]
    fn ratios_follow_from_the_counts() {
        let usage = Usage {
            prompt_tokens: 3,
            generated_tokens: 12,
            forwards: Forwards { denoise: 4, ..Forwards::default() },
            steps: 4,
            queued: Duration::from_millis(500),
            time_to_first_commit: Some(Duration::from_millis(250)),
            decoding: Duration::from_secs(1),
            ..Usage::default()
        };
        let object = usage_object(&usage);
        assert_eq!(object["tokens_per_forward"], 3.0);
        assert_eq!(object["tokens_per_second"], 12.0);
        assert_eq!(object["tokens_per_second_end_to_end"], 8.0);
        assert_eq!(
            usage_line(FinishReason::Stop, &usage),
            "12 tokens in 4 steps, 4 forwards (3.0 tokens each), 1.00 s (12 tokens/s, first after 250 ms), finished by stop"
        );
    }

    #[test]
    fn nothing_generated_divides_by_nothing() {
        let object = usage_object(&Usage::default());
        assert_eq!(object["tokens_per_forward"], 0.0);
        assert_eq!(object["tokens_per_second"], 0.0);
        assert!(object["seconds_to_first_commit"].is_null());
    }
}
