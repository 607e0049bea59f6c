//! What librdkafka says by itself, as log lines: its own log, and errors of the connection.
//!
//! Owns: saying once per episode, not once per attempt, that brokers are away and that they are back; remembering the
//! last reason, for errors that only say "timed out"; remembering that credentials were refused, which waiting cannot
//! help. Does not own: errors of a partition, which come in the order of its records.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rdkafka::types::RDKafkaErrorCode as Code;

/// Shared by the clients of one source: to the user they are one connection.
#[derive(Debug, Default)]
pub struct Health {
    down: AtomicBool,
    state: Mutex<State>,
    /// Offset commits on their way to the group coordinator.
    pub commits: AtomicI64,
}

#[derive(Debug, Default)]
struct State {
    down_since: Option<Instant>,
    last_reason: Option<String>,
    refused: Option<String>,
}

impl Health {
    /// Some broker answered.
    pub fn ok(&self) {
        if self.down.swap(false, Ordering::Relaxed) {
            let mut state = self.state();
            let away_ms = state.down_since.take().map_or(0, |since| since.elapsed().as_millis() as u64);
            state.last_reason = None;
            tracing::info!(away_ms, "kafka brokers are reachable again");
        }
    }

    pub fn error(&self, code: i32, reason: &str) {
        let mut state = self.state();
        if refuses_credentials(code) {
            state.refused = Some(reason.to_string());
        }
        // That all are down is a summary, which says less than what came before it.
        if code != Code::AllBrokersDown as i32 || state.last_reason.is_none() {
            state.last_reason = Some(reason.to_string());
        }
        if state.down_since.is_none() {
            state.down_since = Some(Instant::now());
            self.down.store(true, Ordering::Relaxed);
            tracing::warn!(reason, "connection to a kafka broker failed, librdkafka keeps trying");
        } else {
            tracing::debug!(reason, "connection to a kafka broker failed");
        }
    }

    /// Why the last connection failed, if none has worked since.
    pub fn last_reason(&self) -> Option<String> {
        self.state().last_reason.clone()
    }

    /// The brokers' words when they refused the credentials.
    pub fn refused(&self) -> Option<String> {
        self.state().refused.clone()
    }

    pub fn committed(&self, failure: Option<&str>) {
        self.commits.fetch_sub(1, Ordering::Relaxed);
        if let Some(reason) = failure {
            tracing::debug!(reason, "reporting offsets to the consumer group failed");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuses_credentials(code: i32) -> bool {
    [Code::Authentication, Code::SaslAuthenticationFailed, Code::ClusterAuthorizationFailed]
        .iter()
        .any(|&c| c as i32 == code)
}

/// A line of librdkafka's own log; levels are syslog's.
pub fn log(level: i32, facility: &str, message: &str) {
    match level {
        // Failed connections also reach `Health::error`, which knows whether it has said so already.
        _ if facility == "FAIL" => tracing::debug!(target: "librdkafka", facility, "{message}"),
        0..=3 => tracing::error!(target: "librdkafka", facility, "{message}"),
        4 => tracing::warn!(target: "librdkafka", facility, "{message}"),
        5 | 6 => tracing::info!(target: "librdkafka", facility, "{message}"),
        _ => tracing::debug!(target: "librdkafka", facility, "{message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_episode_ends_with_an_answer() {
        let health = Health::default();
        assert_eq!(health.last_reason(), None);
        health.error(Code::AllBrokersDown as i32, "1/1 brokers are down");
        health.error(Code::BrokerTransportFailure as i32, "connection refused");
        assert_eq!(health.last_reason().as_deref(), Some("connection refused"));
        assert_eq!(health.refused(), None);
        health.ok();
        assert_eq!(health.last_reason(), None);
    }

    #[test]
    fn refused_credentials_are_remembered() {
        let health = Health::default();
        health.error(Code::Authentication as i32, "SASL authentication error");
        assert_eq!(health.refused().as_deref(), Some("SASL authentication error"));
    }
}
