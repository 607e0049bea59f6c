//! Points in the protocol at which a test can kill, stop or fail the process. Only debug builds have them.
//!
//! `FLOE_FAILPOINT=<name>:<action>[:<nth>]` acts on the nth time (default 1) that the point is reached; actions are
//! `kill` (SIGKILL), `stop` (SIGSTOP: the process sleeps until a test sends SIGCONT) and `fail` (the point returns an error once).
//! The name `any` stands for every point; the one that acts is named on stderr.

/// Returns true when the caller is to fail with a transient error.
#[cfg(debug_assertions)]
pub fn hit(name: &str) -> bool {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Armed {
        name: String,
        action: String,
        nth: u64,
        hits: AtomicU64,
    }
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| {
        let spec = std::env::var("FLOE_FAILPOINT").ok()?;
        let mut parts = spec.split(':');
        Some(Armed {
            name: parts.next()?.to_string(),
            action: parts.next()?.to_string(),
            nth: parts.next().and_then(|n| n.parse().ok()).unwrap_or(1),
            hits: AtomicU64::new(0),
        })
    });
    let Some(armed) = armed.as_ref().filter(|a| a.name == name || a.name == "any") else { return false };
    if armed.hits.fetch_add(1, Ordering::SeqCst) + 1 != armed.nth {
        return false;
    }
    eprintln!("failpoint {name}: {}", armed.action);
    match armed.action.as_str() {
        "fail" => true,
        action => {
            let signal = if action == "stop" { libc::SIGSTOP } else { libc::SIGKILL };
            // SAFETY: sends a signal to this very process; no memory is involved.
            #[allow(unsafe_code)]
            unsafe {
                libc::kill(libc::getpid(), signal);
            }
            false
        }
    }
}

#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn hit(_name: &str) -> bool {
    false
}
