//! librdkafka's settings: defaults, then the user's, then those that the protocol needs. A user who sets one of the last
//! is told so when the configuration is loaded ([`crate::config::OWNED_PROPERTIES`]).

use rdkafka::ClientConfig;

use super::{ChunkSettings, QueryNames};
use crate::config::SourceConfig;

/// For the client that plans and reports.
pub fn planner(config: &SourceConfig, names: &QueryNames) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("client.id", &names.client_id)
        .set("group.id", &names.group_id)
        .set("isolation.level", "read_committed")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "50")
        .set("check.crcs", "true")
        // Otherwise an outage of minutes is followed by ten more idle seconds.
        .set("reconnect.backoff.max.ms", "2000")
        // Never subscribed, never in a group: nothing to be expelled from while tables are being written.
        .set("max.poll.interval.ms", "86400000");
    for (key, value) in &config.kafka {
        client.set(key, value);
    }
    client
        .set("bootstrap.servers", &config.bootstrap_servers)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("enable.partition.eof", "true");
    client
}

/// What librdkafka needs for a queued record beside its bytes, and does not count.
const RECORD_OVERHEAD: u64 = 384;

/// For the client that reads `partitions` partitions: half of the budget is librdkafka's queues, which it counts by
/// partition; the other half is for chunks.
pub fn reader(planner: &ClientConfig, chunks: &ChunkSettings, partitions: usize) -> ClientConfig {
    let mut client = planner.clone();
    let kbytes = (chunks.buffer_bytes / 2 / 1024 / partitions.max(1) as u64).clamp(64, 65_536);
    client.set("queued.max.messages.kbytes", kbytes.to_string());
    if planner.get("queued.min.messages").is_none() {
        let messages = (kbytes * 1024 / RECORD_OVERHEAD).max(1000);
        client.set("queued.min.messages", messages.to_string());
    }
    client
}

/// Whether plans must end at the last stable offset, as the records that are read do.
pub fn reads_committed(client: &ClientConfig) -> bool {
    client.get("isolation.level") != Some("read_uncommitted")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::StartingOffsets;

    fn config(kafka: &[(&str, &str)]) -> SourceConfig {
        SourceConfig {
            bootstrap_servers: "localhost:9092".into(),
            topics: vec!["t".into()],
            starting_offsets: StartingOffsets::Earliest,
            max_offsets_per_trigger: None,
            max_bytes_per_trigger: None,
            min_offsets_per_trigger: 0,
            max_trigger_delay: Duration::ZERO,
            fail_on_data_loss: true,
            kafka: kafka.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        }
    }

    #[test]
    fn what_the_protocol_needs_wins_over_the_user() {
        let client = planner(&config(&[("auto.offset.reset", "latest")]), &QueryNames::of("p"));
        assert_eq!(client.get("auto.offset.reset"), Some("error"));
    }

    #[test]
    fn the_user_wins_over_our_defaults() {
        let user = config(&[("client.id", "mine"), ("group.id", "g"), ("isolation.level", "read_uncommitted")]);
        let client = planner(&user, &QueryNames::of("p"));
        assert_eq!(client.get("client.id"), Some("mine"));
        assert_eq!(client.get("group.id"), Some("g"));
        assert!(!reads_committed(&client));
        assert!(reads_committed(&planner(&config(&[]), &QueryNames::of("p"))));
    }

    #[test]
    fn the_buffer_is_shared_out_over_partitions() {
        let client = planner(&config(&[]), &QueryNames::of("p"));
        let chunks = ChunkSettings { buffer_bytes: 64 << 20, ..ChunkSettings::default() };
        assert_eq!(reader(&client, &chunks, 8).get("queued.max.messages.kbytes"), Some("4096"));
        assert_eq!(reader(&client, &chunks, 100_000).get("queued.max.messages.kbytes"), Some("64"));
    }
}
