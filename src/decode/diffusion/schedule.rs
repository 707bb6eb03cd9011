//! How many cells each step of a fixed-count schedule commits.

/// LLaDA's linear schedule: `masked` cells over `steps`, the remainder one each to the first steps.
pub fn linear(masked: usize, steps: usize, step: usize) -> usize {
    let (base, rest) = (masked / steps, masked % steps);
    base + usize::from(step < rest)
}

/// Dream's timesteps: from 1 down to `eps` in `steps` equal strides.
///
/// Computed in f32, as the original's `linspace` does, because what follows is cut to a whole number.
fn timestep(steps: usize, eps: f64, index: usize) -> f32 {
    let (start, end) = (1.0f32, eps as f32);
    let stride = (end - start) / steps as f32;
    // torch's linspace counts from both ends, for symmetry.
    if index < steps.div_ceil(2) + usize::from(steps.is_multiple_of(2)) {
        start + stride * index as f32
    } else {
        end - stride * (steps - index) as f32
    }
}

/// The share of the masked cells that step `step` of Dream's schedule reveals; the last step reveals the rest.
pub fn timestep_share(steps: usize, eps: f64, step: usize) -> f32 {
    if step + 1 >= steps {
        return 1.0;
    }
    1.0 - timestep(steps, eps, step + 1) / timestep(steps, eps, step)
}

/// Cells to commit of `masked` in step `step` of Dream's schedule (`int(masked · (1 − s/t))`).
pub fn timestep_count(masked: usize, steps: usize, eps: f64, step: usize) -> usize {
    (masked as f32 * timestep_share(steps, eps, step)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_commits_everything_and_the_remainder_first() {
        let counts: Vec<_> = (0..5).map(|step| linear(16, 5, step)).collect();
        assert_eq!(counts, [4, 3, 3, 3, 3]);
    }

    #[test]
    fn timesteps_match_the_original() {
        let shares: Vec<_> = (0..4).map(|step| timestep_share(4, 1e-3, step)).collect();
        for (share, original) in shares.iter().zip([0.24975, 0.332_888_9, 0.499, 1.0]) {
            assert!((share - original).abs() < 1e-4, "{share} {original}");
        }
        // 16 · (1 − s/t) is a hair under 2 in the first of 8 steps, and the original cuts.
        assert_eq!(timestep_count(16, 8, 1e-3, 0), 1);
        assert_eq!(timestep_count(16, 16, 1e-3, 0), 0);
        assert_eq!(timestep_count(5, 8, 1e-3, 7), 5);
    }
}
