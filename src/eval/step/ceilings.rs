//! What the device can do at most: bytes and arithmetic in a second, measured in the same run as whatever is held against them.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use crate::model::linear::{linear, sample};
use crate::model::quantized::Scheme;
use crate::tensor::{Device, Dtype, Kind, Placement, Tensor, free_memory, synchronize};

/// How long each of the measurements may go on.
const TIME: Duration = Duration::from_millis(500);
/// Bytes that are read, unless memory is short.
const READ: u64 = 1 << 30;
const RUNS_MIN: usize = 3;
const RUNS_MAX: usize = 50;

#[derive(Clone, Debug, Serialize)]
pub struct Ceilings {
    pub bytes_per_second: f64,
    /// How it was reached.
    pub bytes_by: &'static str,
    pub operations_per_second: f64,
    pub operations_by: String,
    /// Of products with weights in fewer bits, rounding of inputs included, where the model has such.
    pub coded_per_second: Option<f64>,
}

impl Ceilings {
    /// The best of several runs each.
    pub fn measure(placement: Placement, scheme: Option<Scheme>) -> Result<Self> {
        tch::no_grad(|| {
            let (bytes_per_second, bytes_by) = match placement.device {
                Device::Cpu => reading()?,
                device => (copying(device)?, "copy on the device, bytes read and written"),
            };
            // Large enough to fill the device, small enough to be over in a moment.
            let size = if placement.device == Device::Cpu { 1024 } else { 8192 };
            let (operations_per_second, operations_by) = (multiplying(placement, size)?, product(placement.dtype, size));
            let coded_per_second = scheme.map_or(Ok(None), |scheme| multiplying_codes(scheme, placement, size))?;
            Ok(Self { bytes_per_second, bytes_by, operations_per_second, operations_by, coded_per_second })
        })
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { bytes_per_second, bytes_by, operations_per_second, operations_by, coded_per_second } = self;
        write!(
            f,
            "{:.1} GB/s ({bytes_by}), {:.2} TFLOP/s ({operations_by})",
            bytes_per_second / 1e9,
            operations_per_second / 1e12
        )?;
        coded_per_second.map_or(Ok(()), |rate| write!(f, ", {:.2} TFLOP/s with weights in fewer bits", rate / 1e12))
    }
}

fn product(dtype: Dtype, size: i64) -> String {
    format!("{} product of {size} by {size} by {size}", dtype.name())
}

/// Seconds of the fastest run, the device being done with all that was sent to it before and after each.
fn fastest<T, E: Into<anyhow::Error>>(device: Device, mut work: impl FnMut() -> Result<T, E>) -> Result<f64> {
    drop(work().map_err(Into::into)?);
    synchronize(device);
    let (began, mut best) = (Instant::now(), f64::INFINITY);
    for run in 0..RUNS_MAX {
        if run >= RUNS_MIN && began.elapsed() > TIME {
            break;
        }
        let started = Instant::now();
        drop(work().map_err(Into::into)?);
        synchronize(device);
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Decoding reads far more than it writes, so that what counts on a CPU is reading: by libtorch's sum, or by a product with one row,
/// whichever is faster. Much more is read than a cache holds.
fn reading() -> Result<(f64, &'static str)> {
    let columns = 1024;
    let bytes = free_memory(Device::Cpu).map_or(READ, |free| READ.min(free / 4)) as i64;
    let matrix = Tensor::f_ones([bytes / 4 / columns, columns], (Kind::Float, Device::Cpu))?;
    let row = Tensor::f_ones([1, columns], (Kind::Float, Device::Cpu))?;
    let sum = fastest(Device::Cpu, || matrix.f_sum(Kind::Float))?;
    let product = fastest(Device::Cpu, || linear(&row, &matrix, None))?;
    let by = if product < sum { "reading, by a product with one row" } else { "reading, by a sum" };
    Ok((matrix.numel() as f64 * 4.0 / sum.min(product), by))
}

fn copying(device: Device) -> Result<f64> {
    let bytes = 1 << 30;
    let from = Tensor::f_zeros([bytes], (Kind::Uint8, device))?;
    let mut to = from.f_empty_like()?;
    let seconds = fastest(device, || to.f_copy_(&from))?;
    Ok(2.0 * bytes as f64 / seconds)
}

fn multiplying(placement: Placement, size: i64) -> Result<f64> {
    let options = (placement.dtype.kind(), placement.device);
    let (a, b) = (Tensor::f_ones([size, size], options)?, Tensor::f_ones([size, size], options)?);
    let plain = fastest(placement.device, || a.f_linear(&b, None::<&Tensor>))?;
    let own = fastest(placement.device, || linear(&a, &b, None))?;
    Ok(2.0 * (size as f64).powi(3) / plain.min(own))
}

fn multiplying_codes(scheme: Scheme, placement: Placement, size: i64) -> Result<Option<f64>> {
    let Some(product) = sample(scheme, placement, size)? else { return Ok(None) };
    let x = Tensor::f_ones([size, size], (placement.dtype.kind(), placement.device))?;
    Ok(Some(2.0 * (size as f64).powi(3) / fastest(placement.device, || product(&x))?))
}
