//! Panics, counted and logged. The one thing that is the process's and not a server's: a panic says nothing of whose it is.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::error;

static PANICS: AtomicU64 = AtomicU64::new(0);

/// Panics since [`watch`] was called first.
pub fn count() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Counts panics from here on, and writes them to the log, where one in JSON stays JSON. Whoever contains a panic tells whose request
/// it was.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            if tracing::dispatcher::has_been_set() {
                let payload = panic.payload();
                let owned = || payload.downcast_ref::<String>().map(String::as_str);
                let message = payload.downcast_ref::<&str>().copied().or_else(owned).unwrap_or("(no message)");
                let place = panic.location().map(ToString::to_string);
                let thread = std::thread::current().name().map(str::to_owned);
                error!(message, place, thread, "panicked");
            } else {
                before(panic);
            }
        }));
    });
}
