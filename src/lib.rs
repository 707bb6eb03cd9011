//! **lacuna** runs diffusion language models: it starts from a canvas of masked tokens and fills it in parallel.
//!
//! The modules, in reading order: [`tensor`] is the door to libtorch, [`checkpoint`] reads model folders, [`model`] is the
//! network, [`decode`] the decoding state machines, [`engine`] runs them on a device, [`service`] puts the engine on gRPC,
//! [`http`] on HTTP beside it.
//! [`eval`] and [`train`] measure and make the small models that ship, [`compress`] writes models in fewer bits, [`cli`] is the command line. `ARCHITECTURE.md` has the map.

pub mod checkpoint;
pub mod cli;
pub mod compress;
pub mod decode;
pub mod draft;
pub mod engine;
pub mod eval;
pub mod http;
pub mod model;
pub mod service;
pub mod telemetry;
pub mod tensor;
pub mod train;
