//! Logs: to stderr, as text or JSON lines. `FLOE_LOG` filters (`info`, `debug`, `floe::sink=debug,info` …), `FLOE_LOG_FORMAT`
//! is `text` (default) or `json`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Starts logging at `info`. The error says which variable is wrong and what it may be.
pub fn init_logs() -> Result<(), String> {
    init_logs_at("info")
}

/// Starts logging, at the given level unless `FLOE_LOG` says otherwise. A second call changes nothing.
pub fn init_logs_at(default_level: &str) -> Result<(), String> {
    let filter = filter(std::env::var("FLOE_LOG").ok().as_deref(), default_level)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match std::env::var("FLOE_LOG_FORMAT").as_deref() {
        // An error means that logging has been started before, as tests do.
        Err(_) | Ok("" | "text") => drop(builder.with_ansi(std::io::stderr().is_terminal()).try_init()),
        Ok("json") => drop(builder.json().flatten_event(true).try_init()),
        Ok(other) => return Err(format!("FLOE_LOG_FORMAT: found \"{other}\"; allowed are text and json")),
    }
    Ok(())
}

/// librdkafka repeats itself while a broker is away, and the query says so anyway: it is kept at `warn` unless named.
fn filter(spec: Option<&str>, default_level: &str) -> Result<EnvFilter, String> {
    let spec = spec.map(str::trim).filter(|s| !s.is_empty()).unwrap_or(default_level);
    let quiet =
        if spec.contains("rdkafka") || spec == "error" || spec == "off" { "" } else { ",rdkafka=warn,librdkafka=warn" };
    EnvFilter::try_new(format!("{spec}{quiet}")).map_err(|e| {
        format!("FLOE_LOG: found \"{spec}\": {e}; use a level (error, warn, info, debug, trace) or module=level, separated by commas")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn librdkafka_is_quiet_unless_named() {
        assert!(filter(None, "info").unwrap().to_string().contains("librdkafka=warn"));
        assert!(filter(Some("debug"), "info").unwrap().to_string().contains("librdkafka=warn"));
        assert!(!filter(Some("librdkafka=debug"), "info").unwrap().to_string().contains("librdkafka=warn"));
    }

    #[test]
    fn a_wrong_filter_is_named() {
        let message = filter(Some("floe=loud"), "info").unwrap_err();
        assert!(message.contains("FLOE_LOG") && message.contains("floe=loud"), "{message}");
    }
}
