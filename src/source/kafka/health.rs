//! What librdkafka says by itself, as log lines: its own log, and errors of its connections.
//!
//! Owns: saying once per episode, not once per attempt, that a broker or all of them are away and that they are back;
//! remembering the last reason, for errors that only say "timed out"; remembering that credentials were refused, which
//! waiting cannot help. Does not own: errors of a partition, which come in the order of its records.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::types::RDKafkaErrorCode as Code;

/// A broker that has not failed for so long was back in between. librdkafka repeats an error every half minute.
const EPISODE: Duration = Duration::from_secs(90);

/// Shared by the clients of one source: to the user they are one connection.
#[derive(Debug, Default)]
pub struct Health {
    /// No broker at all is reachable.
    all_down: AtomicBool,
    state: Mutex<State>,
    /// Offset commits on their way to the group coordinator.
    pub commits: AtomicI64,
}

#[derive(Debug, Default)]
struct State {
    all_down_since: Option<Instant>,
    /// When each broker last failed.
    failed: BTreeMap<String, Instant>,
    last: Option<(Instant, String)>,
    refused: Option<String>,
}

impl Health {
    /// Some broker answered.
    pub fn ok(&self) {
        if self.all_down.load(Ordering::Relaxed) && self.all_down.swap(false, Ordering::Relaxed) {
            let mut state = self.state();
            let away_ms = state.all_down_since.take().map_or(0, |since| since.elapsed().as_millis() as u64);
            state.failed.clear();
            state.last = None;
            tracing::info!(away_ms, "kafka brokers are reachable again");
        }
    }

    pub fn error(&self, code: i32, reason: &str) {
        let mut state = self.state();
        let now = Instant::now();
        if code == Code::AllBrokersDown as i32 {
            if state.all_down_since.is_none() {
                state.all_down_since = Some(now);
                self.all_down.store(true, Ordering::Relaxed);
                tracing::warn!(reason, "no kafka broker is reachable, librdkafka keeps trying");
            }
            // A summary, which says less than what came before it.
            if state.last.is_some() {
                return;
            }
        } else {
            // "sasl_ssl://host:port/id: reason"
            let broker = reason.split(": ").next().unwrap_or_default().to_string();
            let again = state.failed.insert(broker, now).is_some_and(|last| last.elapsed() < EPISODE);
            if again {
                tracing::debug!(reason, "connection to a kafka broker failed again");
            } else {
                tracing::warn!(reason, "connection to a kafka broker failed, librdkafka keeps trying");
            }
        }
        if refuses_credentials(code) {
            state.refused = Some(reason.to_string());
        }
        state.last = Some((now, reason.to_string()));
    }

    /// Why a connection failed lately.
    pub fn last_reason(&self) -> Option<String> {
        let state = self.state();
        state.last.as_ref().filter(|(when, _)| when.elapsed() < EPISODE).map(|(_, reason)| reason.clone())
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
        health.error(Code::BrokerTransportFailure as i32, "localhost:9092/1: connection refused");
        health.error(Code::AllBrokersDown as i32, "1/1 brokers are down");
        assert_eq!(health.last_reason().as_deref(), Some("localhost:9092/1: connection refused"));
        assert_eq!(health.refused(), None);
        health.ok();
        assert_eq!(health.last_reason(), None);
    }

    #[test]
    fn one_broker_of_several_is_no_outage() {
        let health = Health::default();
        health.error(Code::BrokerTransportFailure as i32, "a:9092/1: connection refused");
        health.ok();
        assert_eq!(health.state().failed.len(), 1, "said once, whatever others answer");
        health.error(Code::AllBrokersDown as i32, "2/2 brokers are down");
        health.ok();
        assert_eq!(health.state().failed.len(), 0);
    }

    #[test]
    fn refused_credentials_are_remembered() {
        let health = Health::default();
        health.error(Code::Authentication as i32, "SASL authentication error");
        assert_eq!(health.refused().as_deref(), Some("SASL authentication error"));
    }
}
