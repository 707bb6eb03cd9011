//! The running server among peers that are slow, silent, broken or hostile: they lose, and nobody else does.
//!
//! The server is the real binary. Peers speak TCP and HTTP/2 by hand where a well-behaved client would not do what is wanted.

#[path = "../common/process.rs"]
mod process;

mod crowd;
mod malformed;
mod readers;
mod resets;
mod shutdown;
mod wire;
