//! Whether generated text is right, and how fast it came: tasks, the execution of generated code, measurements, and reports of them.

pub mod distance;
pub mod likelihood;
pub mod load;
pub mod machine;
pub mod nano;
pub mod problems;
pub mod record;
pub mod report;
pub mod sandbox;
pub mod score;
pub mod speculate;
pub mod step;
pub mod suite;
pub mod sweep;
pub mod task;
