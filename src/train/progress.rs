//! What every training run shares besides its steps: how far it has come, how long it may go on, and what it shows and leaves
//! behind of that. It knows nothing of networks.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::checkpoint::write_atomically;

/// A checkpoint is written this often, so that a kill loses less than a minute.
pub const CHECKPOINT_EVERY: Duration = Duration::from_secs(30);

/// Where a run stands; saved with the weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    pub step: u64,
    pub tokens: u64,
    pub seconds: f64,
}

/// How long a run lasts.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Budget {
    /// Optimiser steps; with --minutes too, the run ends at the first of the two
    #[arg(long, required_unless_present = "minutes")]
    pub steps: Option<u64>,
    /// Time spent training, earlier runs that are resumed included; what a teacher takes to write its texts is not
    #[arg(long)]
    pub minutes: Option<f64>,
    /// Checkpoint and stop after so many further steps; the same command goes on from there
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u64>,
}

impl Budget {
    pub fn check(self) -> Result<()> {
        ensure!(self.steps.is_some() || self.minutes.is_some(), "say how long to train: --steps or --minutes");
        let minutes = self.minutes.unwrap_or(1.0);
        ensure!(minutes > 0.0 && minutes.is_finite() && self.steps != Some(0), "--minutes and --steps must be above 0");
        Ok(())
    }

    /// The step at which this sitting of a run that stands at `progress` ends, whether or not it is done.
    pub fn stop(self, progress: Progress) -> u64 {
        self.stop_after.map_or(u64::MAX, |steps| progress.step.saturating_add(steps))
    }

    /// Share of the run that is done, 0 to 1: by steps where they are given, else by time spent training.
    pub fn share(self, progress: Progress) -> f64 {
        let steps = self.steps.map_or(0.0, |steps| progress.step as f64 / steps as f64);
        let time = self.minutes.map_or(0.0, |minutes| progress.seconds / 60.0 / minutes);
        steps.max(time).min(1.0)
    }

    /// Linear over 300 steps (a tenth of a shorter run), then 1.
    pub fn warm_up(self, progress: Progress) -> f64 {
        let steps = self.steps.map_or(300.0, |steps| (steps as f64 / 10.0).clamp(1.0, 300.0));
        ((progress.step + 1) as f64 / steps).min(1.0)
    }
}

/// The curve goes on where a resumed run stands; lines past that point come from steps that a kill undid.
pub fn curve_file(path: &Path, progress: Progress) -> Result<File> {
    let old = std::fs::read_to_string(path).unwrap_or_default();
    let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?.get("step")?.as_u64();
    let kept: String =
        old.lines().filter(|line| step(line).is_some_and(|s| s <= progress.step)).map(|l| format!("{l}\n")).collect();
    write_atomically(path, kept.as_bytes())?;
    File::options().append(true).open(path).context("cannot open the learning curve")
}

pub fn bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{elapsed_precise} [{bar:40}] {percent}% {msg} eta {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// Smoothed loss and speed for the display and the curve.
#[derive(Default)]
pub struct Recent {
    pub loss: f64,
    tokens: f64,
    seconds: f64,
}

impl Recent {
    pub fn add(&mut self, loss: f64, tokens: usize, time: Duration) {
        const KEEP: f64 = 0.99;
        self.loss = if self.seconds == 0.0 { loss } else { KEEP * self.loss + (1.0 - KEEP) * loss };
        self.tokens = KEEP * self.tokens + tokens as f64;
        self.seconds = KEEP * self.seconds + time.as_secs_f64();
    }

    pub fn rate(&self) -> f64 {
        self.tokens / self.seconds.max(1e-9)
    }
}
