#!/usr/bin/env bash
# Readings of 500 devices, some 200 a second, one in 200 of them not as the schema wants it. Usage: generate.sh BROKERS TOPIC
set -euo pipefail

readings() {
  while sleep 1; do
    awk -v n=200 'BEGIN {
      srand()
      now = strftime("%Y-%m-%dT%H:%M:%SZ", systime())
      split("online offline charging idle", statuses, " ")
      for (i = 0; i < n; i++) {
        device = "device-" int(rand() * 500)
        battery = rand() < 0.005 ? "\"full\"" : sprintf("%.1f", rand() * 100)
        printf "%s\t{\"device_id\":\"%s\",\"event_timestamp\":\"%s\",\"battery_level\":%s,\"signal_strength\":%d,\"duration_ms\":%d,\"status\":\"%s\"}\n",
          device, device, now, battery, -30 - int(rand() * 90), int(rand() * 5000), statuses[1 + int(rand() * 4)]
      }
    }'
  done
}

readings | exec "${KAFKA_HOME:-/opt/kafka}/bin/kafka-console-producer.sh" --bootstrap-server "$1" --topic "$2" \
  --property parse.key=true --property "key.separator=$(printf '\t')"
