//! `group_by`, `partition_by` and `sort_by` as the user writes them, as far as the configuration is concerned: their spelling and the
//! column that they name. Pure.

/// `day(event_timestamp)`, `bucket(16, device_id)`, `status` → the column.
pub fn partition_column(text: &str) -> Result<&str, String> {
    let text = text.trim();
    let Some((function, rest)) = text.split_once('(') else { return column(text) };
    let arguments = rest.strip_suffix(')').ok_or_else(|| format!("{text:?} has no closing parenthesis"))?;
    let function = function.trim().to_ascii_lowercase();
    match function.as_str() {
        "identity" | "year" | "years" | "month" | "months" | "day" | "days" | "hour" | "hours" => {
            column(arguments.trim())
        }
        "bucket" | "truncate" => {
            let (width, name) = arguments
                .split_once(',')
                .ok_or_else(|| format!("{text:?} needs a number and a column: {function}(16, column)"))?;
            match width.trim().parse::<u32>() {
                Ok(width) if width > 0 => column(name.trim()),
                _ => Err(format!("{:?} in {text:?} is not a number above 0", width.trim())),
            }
        }
        _ => Err(format!(
            "{function:?} is no partition function; allowed are year, month, day, hour, bucket(n, column), \
             truncate(n, column), identity, or a column alone"
        )),
    }
}

/// `device_id`, `device_id desc`, `day(event_timestamp) asc` → the column.
pub fn sort_column(text: &str) -> Result<&str, String> {
    let text = text.trim();
    let direction = text.rsplit_once(char::is_whitespace).filter(|(_, last)| {
        let last = last.to_ascii_lowercase();
        last == "asc" || last == "desc"
    });
    partition_column(direction.map_or(text, |(key, _)| key)).map_err(|_| {
        format!("{text:?} is no sort key; allowed is a column, or one as in partition_by, then asc or desc")
    })
}

/// `device_id`, `upper(region) as region` → the SQL of a group key and its name in the table.
pub fn key_name<'a>(text: &'a str, columns: &[&str]) -> Result<(&'a str, &'a str), String> {
    let text = text.trim();
    if columns.contains(&text) {
        return Ok((text, text));
    }
    let words = text.rsplit_once(char::is_whitespace).filter(|(_, name)| column(name).is_ok());
    let named = words.and_then(|(before, name)| {
        let (sql, keyword) = before.trim_end().rsplit_once(char::is_whitespace)?;
        keyword.eq_ignore_ascii_case("as").then_some((sql.trim_end(), name))
    });
    named.ok_or_else(|| match column(text) {
        Ok(_) => format!("{text:?} is no column; there are {}", columns.join(", ")),
        Err(_) => format!("{text:?} needs a name: \"{text} as name\""),
    })
}

fn column(text: &str) -> Result<&str, String> {
    let sound = !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || c == '_');
    if sound { Ok(text) } else { Err(format!("{text:?} is no column name")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions() {
        for (text, expected) in [
            ("day(event_timestamp)", Some("event_timestamp")),
            (" status ", Some("status")),
            ("identity(status)", Some("status")),
            ("bucket(16, device_id)", Some("device_id")),
            ("truncate(4,device_id)", Some("device_id")),
            ("bucket(device_id)", None),
            ("bucket(0, device_id)", None),
            ("week(event_timestamp)", None),
            ("day(event_timestamp", None),
            ("", None),
        ] {
            assert_eq!(partition_column(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn group_keys() {
        let columns = ["device_id", "odd name", "a as b"];
        for (text, expected) in [
            ("device_id", Some(("device_id", "device_id"))),
            ("odd name", Some(("odd name", "odd name"))),
            ("a as b", Some(("a as b", "a as b"))),
            ("upper(region) as region", Some(("upper(region)", "region"))),
            ("cast(n as varchar)  AS  text", Some(("cast(n as varchar)", "text"))),
            ("cast(n as varchar)", None),
            ("upper(region)", None),
            ("device", None),
            ("n % 10 as", None),
        ] {
            assert_eq!(key_name(text, &columns).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn sort_keys() {
        for (text, expected) in [
            ("device_id", Some("device_id")),
            ("device_id desc", Some("device_id")),
            ("device_id ASC", Some("device_id")),
            ("day(event_timestamp) desc", Some("event_timestamp")),
            ("device_id down", None),
            ("device_id desc nulls last", None),
            ("", None),
        ] {
            assert_eq!(sort_column(text).ok(), expected, "{text:?}");
        }
    }
}
