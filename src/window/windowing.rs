//! What a window is: which windows hold a time, and where a window that begins at a time ends. Pure.
//!
//! A window is known by its start alone. Windows lie on a grid: in UTC its lines are `slide` apart, counted from the epoch
//! plus `start`; in a time zone they are at local midnight plus `start`, so that a day in which the clocks change has 23 or
//! 25 hours. Ends never decrease from one window to the next, whatever the grid.

use std::fmt;
use std::time::Duration;

use jiff::civil::{Date, Time, date};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Span, Timestamp};

const DAY_US: i64 = 86_400_000_000;
const EPOCH: Date = date(1970, 1, 1);
/// A row of a day in windows that begin every minute is in 1,440 of them; more than this is a slip of the unit.
const MAX_WINDOWS_OF_A_ROW: i64 = 10_000;

/// Size, slide, offset and zone of the windows of one query.
#[derive(Clone, Debug, PartialEq)]
pub struct Windowing {
    size_us: i64,
    slide_us: i64,
    offset_us: i64,
    /// None: UTC. Sizes are then whole days.
    zone: Option<TimeZone>,
    /// Of sessions it says what a row alone would make: one that begins with the row and ends a gap, the size, later.
    session: bool,
}

/// The windows that hold a time, and the times around it that are in the very same windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Covering {
    /// The latest first.
    pub starts: Vec<i64>,
    from_us: i64,
    until_us: i64,
}

impl Covering {
    pub fn holds(&self, time_us: i64) -> bool {
        // what ends at the end of the range holds its last microsecond too
        self.from_us <= time_us && (time_us < self.until_us || self.until_us == i64::MAX)
    }

    /// No time before it is in the very same windows.
    pub fn from_us(&self) -> i64 {
        self.from_us
    }
}

impl Windowing {
    /// `slide` absent: windows follow each other. `start` shifts them. All mistakes, each with its setting.
    pub fn new(
        size: Duration,
        slide: Option<Duration>,
        start: Duration,
        zone: Option<&str>,
    ) -> Result<Windowing, Vec<(&'static str, String)>> {
        let mut errors = Vec::new();
        let micros = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        let (size_us, offset_us) = (micros(size), micros(start));
        let slide_us = slide.map_or(size_us, micros);
        if size_us == 0 {
            errors.push(("size", "found 0, allowed is a duration above 0".to_string()));
        }
        if slide_us == 0 && slide.is_some() {
            errors.push(("slide", "found 0, allowed is a duration above 0".to_string()));
        } else if slide_us > size_us {
            errors.push(("slide", "is longer than size: rows between two windows would be in none".to_string()));
        } else if size_us / slide_us.max(1) > MAX_WINDOWS_OF_A_ROW && slide_us > 0 {
            let windows = size_us / slide_us;
            let problem = format!("puts every row into {windows} windows; allowed are up to {MAX_WINDOWS_OF_A_ROW}");
            errors.push(("slide", problem));
        }
        if slide_us > 0 && offset_us >= slide_us {
            let than = if slide.is_some() { "slide" } else { "size" };
            errors.push(("start", format!("must be shorter than {than}, at which windows begin again")));
        }
        let zone = zone.and_then(|name| match TimeZone::get(name) {
            Ok(zone) => Some(zone),
            Err(_) => {
                let allowed = "allowed is a name of the IANA time zone database such as \"Europe/Berlin\"";
                errors.push(("time_zone", format!("found {name:?}, {allowed}")));
                None
            }
        });
        if zone.is_some() {
            for (key, duration_us) in [("size", size_us), ("slide", slide_us)] {
                if duration_us % DAY_US != 0 && (key == "size" || slide.is_some()) {
                    errors.push((key, "must be whole days or weeks in a time_zone".to_string()));
                }
            }
        }
        if errors.is_empty() {
            Ok(Windowing { size_us, slide_us, offset_us, zone, session: false })
        } else {
            Err(errors)
        }
    }

    /// Sessions, which end when their key has had no row for `gap`.
    pub fn session(gap: Duration) -> Result<Windowing, String> {
        let gap_us = i64::try_from(gap.as_micros()).unwrap_or(i64::MAX);
        match gap_us {
            0 => Err("found 0, allowed is a duration above 0".to_string()),
            _ => Ok(Windowing { size_us: gap_us, slide_us: gap_us, offset_us: 0, zone: None, session: true }),
        }
    }

    pub fn is_session(&self) -> bool {
        self.session
    }

    /// The length of the windows, or the gap of sessions.
    pub fn size(&self) -> Duration {
        Duration::from_micros(self.size_us.unsigned_abs())
    }

    /// The latest window that holds a time. One that would begin before the smallest `i64` begins there instead.
    pub fn start(&self, time_us: i64) -> i64 {
        match &self.zone {
            None if self.session => time_us,
            None => time_us.saturating_sub(self.past_line(time_us)),
            Some(zone) => self.midnight(zone, self.line_day(zone, time_us)),
        }
    }

    /// The end of the window that begins at `start_us`, which [`Self::start`] or [`Self::covering`] gave; one that would lie
    /// beyond the largest `i64` lies there.
    pub fn end(&self, start_us: i64) -> i64 {
        match &self.zone {
            None if self.session => start_us.saturating_add(self.size_us),
            // Past a line is only the window that is cut short at the lower end of the range.
            None => start_us.saturating_add(self.size_us - self.past_line(start_us)),
            Some(zone) => {
                let day = self.line_day(zone, start_us);
                self.midnight(zone, day.saturating_add(self.size_us / DAY_US))
            }
        }
    }

    /// All windows that hold a time: one, or `size / slide` of them, rounded up, as far as they begin within the range.
    pub fn covering(&self, time_us: i64) -> Covering {
        if self.session {
            let until_us = time_us.saturating_add(1);
            return Covering { starts: vec![time_us], from_us: time_us, until_us };
        }
        let mut start_us = self.start(time_us);
        let mut covering = Covering { starts: vec![start_us], from_us: start_us, until_us: self.next(start_us) };
        while let Some(before_us) = self.previous(start_us) {
            let end_us = self.end(before_us);
            if end_us <= time_us && end_us < i64::MAX {
                covering.from_us = covering.from_us.max(end_us);
                break;
            }
            covering.starts.push(before_us);
            covering.until_us = covering.until_us.min(end_us);
            start_us = before_us;
        }
        covering
    }

    /// When the first of the windows of a time ends: what comes to an end no earlier for any later time.
    pub fn first_end(&self, time_us: i64) -> i64 {
        let oldest = self.covering(time_us).starts.last().copied();
        self.end(oldest.unwrap_or(time_us))
    }

    /// When the last of the windows of a time ends: what comes to an end no later for any earlier time.
    pub fn last_end(&self, time_us: i64) -> i64 {
        self.end(self.start(time_us))
    }

    fn next(&self, start_us: i64) -> i64 {
        match &self.zone {
            None => start_us.saturating_add(self.slide_us - self.past_line(start_us)),
            Some(zone) => {
                let day = self.line_day(zone, start_us);
                self.midnight(zone, day.saturating_add(self.slide_us / DAY_US))
            }
        }
    }

    /// None: it would begin before the range.
    fn previous(&self, start_us: i64) -> Option<i64> {
        let before_us = match &self.zone {
            None if self.past_line(start_us) > 0 => return None,
            None => start_us.checked_sub(self.slide_us)?,
            // A zone that skipped a day has two lines at one instant; the time before it is beyond both.
            Some(_) => self.start(start_us.checked_sub(1)?),
        };
        (before_us < start_us).then_some(before_us)
    }

    /// Microseconds since the last line of the grid in UTC.
    fn past_line(&self, time_us: i64) -> i64 {
        (time_us.rem_euclid(self.slide_us) - self.offset_us).rem_euclid(self.slide_us)
    }

    /// The last day, counted from 1970-01-01, at which a window begins that holds or precedes the time.
    fn line_day(&self, zone: &TimeZone, time_us: i64) -> i64 {
        let of_day_us = self.offset_us % DAY_US;
        let offset_us = match Timestamp::from_microsecond(time_us) {
            Ok(time) => i64::from(zone.to_offset(time).seconds()) * 1_000_000,
            Err(_) => 0,
        };
        // Good to a day: the clocks may have changed between the time and midnight.
        let mut day = time_us.saturating_add(offset_us).saturating_sub(of_day_us).div_euclid(DAY_US);
        while midnight(zone, day, of_day_us) > time_us {
            day -= 1;
        }
        let begun = |midnight_us: i64| midnight_us <= time_us && midnight_us < i64::MAX;
        while begun(midnight(zone, day + 1, of_day_us)) {
            day += 1;
        }
        day - (day - self.offset_us / DAY_US).rem_euclid(self.slide_us / DAY_US)
    }

    fn midnight(&self, zone: &TimeZone, day: i64) -> i64 {
        midnight(zone, day, self.offset_us % DAY_US)
    }
}

/// When a day begins, `of_day_us` past midnight by the clocks there: later where the clocks skip that time, the first where they
/// show it twice. Days beyond the calendar are those of UTC. Never less than for the day before.
fn midnight(zone: &TimeZone, day: i64, of_day_us: i64) -> i64 {
    let local = || {
        let day = EPOCH.checked_add(Span::new().try_days(day).ok()?).ok()?;
        let local = day.to_datetime(Time::midnight()).checked_add(SignedDuration::from_micros(of_day_us)).ok()?;
        zone.to_ambiguous_timestamp(local).compatible().ok()
    };
    match local() {
        Some(time) => time.as_microsecond(),
        None => {
            let time_us = i128::from(day) * i128::from(DAY_US) + i128::from(of_day_us);
            time_us.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
        }
    }
}

/// Two are the same exactly when they read the same.
impl fmt::Display for Windowing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.session {
            return write!(f, "session {}", self.size_us);
        }
        write!(f, "{}", self.size_us)?;
        if self.slide_us != self.size_us {
            write!(f, " slide {}", self.slide_us)?;
        }
        if self.offset_us != 0 {
            write!(f, " start {}", self.offset_us)?;
        }
        if let Some(zone) = &self.zone {
            write!(f, " in {}", zone.iana_name().unwrap_or("UTC"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: i64 = 60_000_000;
    const HOUR: i64 = 60 * MINUTE;

    fn utc(size_us: i64, slide_us: i64, offset_us: i64) -> Windowing {
        let micros = |us: i64| Duration::from_micros(us as u64);
        Windowing::new(micros(size_us), Some(micros(slide_us)), micros(offset_us), None).unwrap()
    }

    fn tumbling(size_us: i64) -> Windowing {
        utc(size_us, size_us, 0)
    }

    fn days(zone: &str, size: u64, slide: u64, start: Duration) -> Windowing {
        let day = |n| Duration::from_secs(n * 86_400);
        Windowing::new(day(size), Some(day(slide)), start, Some(zone)).unwrap()
    }

    fn at(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_microsecond()
    }

    #[test]
    fn tumbling_windows_are_aligned_to_the_epoch_and_half_open() {
        let minute = tumbling(MINUTE);
        assert_eq!(minute.start(0), 0);
        assert_eq!(minute.start(MINUTE - 1), 0);
        assert_eq!(minute.start(MINUTE), MINUTE);
        assert_eq!(minute.start(-1), -MINUTE);
        assert_eq!(minute.end(-MINUTE), 0);
        // a week starts on Thursday
        let week = tumbling(7 * DAY_US);
        assert_eq!(week.start(1_704_067_200_000_000), 1_703_721_600_000_000);
        assert_eq!(
            utc(7 * DAY_US, 7 * DAY_US, 4 * DAY_US).start(at("2026-11-22T23:59:59Z")),
            at("2026-11-16T00:00:00Z")
        );
    }

    #[test]
    fn a_row_is_in_as_many_windows_as_slides_fit_into_the_size() {
        let even = utc(10 * MINUTE, 5 * MINUTE, 0);
        assert_eq!(even.covering(12 * MINUTE).starts, [10 * MINUTE, 5 * MINUTE]);
        assert_eq!(even.covering(-1).starts, [-5 * MINUTE, -10 * MINUTE]);
        let shifted = utc(10 * MINUTE, 5 * MINUTE, 2 * MINUTE);
        assert_eq!(shifted.covering(12 * MINUTE).starts, [12 * MINUTE, 7 * MINUTE]);
        // 10 by 4: three windows, or two
        let uneven = utc(10 * MINUTE, 4 * MINUTE, 0);
        assert_eq!(uneven.covering(9 * MINUTE).starts, [8 * MINUTE, 4 * MINUTE, 0]);
        assert_eq!(uneven.covering(10 * MINUTE).starts, [8 * MINUTE, 4 * MINUTE]);
        let same = uneven.covering(10 * MINUTE);
        assert!(same.holds(12 * MINUTE - 1) && !same.holds(12 * MINUTE) && !same.holds(10 * MINUTE - 1));
        assert_eq!((uneven.first_end(9 * MINUTE), uneven.last_end(9 * MINUTE)), (10 * MINUTE, 18 * MINUTE));
    }

    #[test]
    fn a_day_has_23_or_25_hours_when_the_clocks_change() {
        let day = days("Europe/Berlin", 1, 1, Duration::ZERO);
        for (time, start, hours) in [
            ("2026-03-28T12:00:00Z", "2026-03-27T23:00:00Z", 24),
            ("2026-03-28T23:00:00Z", "2026-03-28T23:00:00Z", 23),
            ("2026-03-29T21:59:59.999999Z", "2026-03-28T23:00:00Z", 23),
            ("2026-03-29T22:00:00Z", "2026-03-29T22:00:00Z", 24),
            ("2026-10-24T22:00:00Z", "2026-10-24T22:00:00Z", 25),
            ("2026-10-25T22:59:59.999999Z", "2026-10-24T22:00:00Z", 25),
            ("2026-10-25T23:00:00Z", "2026-10-25T23:00:00Z", 24),
        ] {
            assert_eq!(day.start(at(time)), at(start), "{time}");
            assert_eq!(day.end(at(start)), at(start) + hours * HOUR, "{time}");
        }
        // weeks from Monday on, a day's work begins at six, two days every day
        let four_days = Duration::from_secs(4 * 86_400);
        let week = days("Europe/Berlin", 7, 7, four_days);
        assert_eq!(week.start(at("2026-03-29T12:00:00Z")), at("2026-03-22T23:00:00Z"));
        assert_eq!(week.end(at("2026-03-22T23:00:00Z")), at("2026-03-29T22:00:00Z"));
        let shift = days("Europe/Berlin", 1, 1, Duration::from_secs(6 * 3600));
        assert_eq!(shift.start(at("2026-03-29T03:59:59Z")), at("2026-03-28T05:00:00Z"));
        assert_eq!(shift.start(at("2026-03-29T04:00:00Z")), at("2026-03-29T04:00:00Z"));
        let two = days("Europe/Berlin", 2, 1, Duration::ZERO);
        assert_eq!(
            two.covering(at("2026-03-29T12:00:00Z")).starts,
            [at("2026-03-28T23:00:00Z"), at("2026-03-27T23:00:00Z")]
        );
        assert_eq!(two.end(at("2026-03-27T23:00:00Z")), at("2026-03-29T22:00:00Z"));
    }

    /// Midnight that does not exist, exists twice, a night that goes back behind midnight, a day that was left out.
    #[test]
    fn zones_with_odd_midnights() {
        let day = |zone| days(zone, 1, 1, Duration::ZERO);
        let sao_paulo = day("America/Sao_Paulo");
        assert_eq!(sao_paulo.start(at("2018-11-04T12:00:00Z")), at("2018-11-04T03:00:00Z"), "the day begins at one");
        let havana = day("America/Havana");
        let first_midnight = at("2026-11-01T04:00:00Z");
        assert_eq!(havana.start(at("2026-11-01T05:30:00Z")), first_midnight);
        assert_eq!(havana.end(first_midnight), first_midnight + 25 * HOUR);
        let st_johns = day("America/St_Johns");
        let midnight = at("2010-11-07T02:30:00Z");
        assert_eq!(st_johns.start(midnight + 30 * MINUTE), midnight, "the second 23:31 is after midnight");
        let apia = day("Pacific/Apia");
        let after = at("2011-12-30T10:00:00Z");
        assert_eq!(apia.start(after - 1), after - 24 * HOUR);
        assert_eq!(
            (apia.start(after), apia.end(after), apia.end(after - 24 * HOUR)),
            (after, after + 24 * HOUR, after)
        );
        let week = days("Pacific/Apia", 7, 1, Duration::ZERO);
        let starts = week.covering(after + 3 * 24 * HOUR).starts;
        assert_eq!(starts.len(), 6, "there were six days in that week");
        assert!(starts.is_sorted_by(|a, b| a > b));
    }

    #[test]
    fn the_ends_of_the_range_do_not_overflow() {
        for size in [1, 7, MINUTE, i64::MAX] {
            let windowing = tumbling(size);
            for time in [i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX - 1, i64::MAX] {
                let start = windowing.start(time);
                let end = windowing.end(start);
                assert!(start <= time && (time < end || end == i64::MAX), "{time} in {size}: [{start}, {end})");
                assert_eq!(windowing.start(start), start);
            }
        }
        // the window cut short at the lower end still ends where the next one begins
        let minute = tumbling(MINUTE);
        let end = minute.end(minute.start(i64::MIN));
        assert_eq!(end.rem_euclid(MINUTE), 0);
        assert!(end - i64::MIN < MINUTE);
    }

    #[test]
    fn mistakes_are_named_all_at_once() {
        let new = |size: u64, slide: Option<u64>, start: u64, zone| {
            let seconds = Duration::from_secs;
            let errors = Windowing::new(seconds(size), slide.map(seconds), seconds(start), zone).unwrap_err();
            errors.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
        };
        assert_eq!(new(0, None, 0, None), ["size"]);
        assert_eq!(new(60, Some(61), 0, None), ["slide"]);
        assert_eq!(new(60, Some(0), 0, None), ["slide"]);
        assert_eq!(new(86_400, Some(1), 0, None), ["slide"]);
        assert_eq!(new(60, Some(30), 30, None), ["start"]);
        assert_eq!(new(3600, Some(60), 60, Some("Europe/Bärlin")), ["start", "time_zone"]);
        assert_eq!(new(3600, Some(60), 0, Some("Europe/Berlin")), ["size", "slide"]);
        assert_eq!(new(3600, None, 0, Some("Europe/Berlin")), ["size"]);
    }

    #[test]
    fn two_are_the_same_exactly_when_they_read_the_same() {
        assert_eq!(tumbling(MINUTE).to_string(), "60000000");
        assert_eq!(utc(MINUTE, MINUTE / 2, 7).to_string(), "60000000 slide 30000000 start 7");
        assert_eq!(days("Europe/Berlin", 1, 1, Duration::ZERO).to_string(), "86400000000 in Europe/Berlin");
    }

    fn windowings() -> impl Strategy<Value = Windowing> {
        let utc = (1..20i64, 1..20i64, 0..20i64).prop_map(|(size, slide, offset)| {
            let slide = slide.min(size);
            utc(size * MINUTE / 7, slide * MINUTE / 7, offset % slide * MINUTE / 7)
        });
        let zones = ["Europe/Berlin", "America/St_Johns", "Pacific/Apia", "America/Havana", "UTC"];
        let zoned = (prop::sample::select(zones.to_vec()), 1..9u64, 1..9u64, 0..9 * 24u64);
        let zoned = zoned.prop_map(|(zone, size, slide, hours)| {
            let slide = slide.min(size);
            days(zone, size, slide, Duration::from_secs(hours % (slide * 24) * 3600))
        });
        prop_oneof![utc, zoned]
    }

    fn times() -> impl Strategy<Value = i64> {
        prop_oneof![
            -2_000_000_000_000_000..4_000_000_000_000_000i64,
            -100 * MINUTE..100 * MINUTE,
            any::<i64>(),
            Just(i64::MIN),
            Just(i64::MAX)
        ]
    }

    proptest! {
        /// Exactly the windows that the definition gives, and the same ones for all times that are said to share them.
        #[test]
        fn covering_is_what_the_definition_says(windowing in windowings(), time in times(), step in -DAY_US..DAY_US) {
            let covering = windowing.covering(time);
            prop_assert!(covering.holds(time));
            prop_assert!(covering.starts.is_sorted_by(|a, b| a > b));
            for &start in &covering.starts {
                let end = windowing.end(start);
                prop_assert!(start <= time && (time < end || end == i64::MAX));
                prop_assert_eq!(windowing.start(start), start);
            }
            prop_assert_eq!(windowing.first_end(time), windowing.end(*covering.starts.last().unwrap()));
            let other = time.saturating_add(step);
            prop_assert_eq!(covering.holds(other), windowing.covering(other).starts == covering.starts);
            // ends follow starts
            let next = windowing.start(windowing.next(covering.starts[0]));
            prop_assert!(windowing.end(next) >= windowing.end(covering.starts[0]));
        }

        /// Spark's formula, for windows in UTC.
        #[test]
        fn in_utc_the_windows_are_sparks(size in 1..40i64, slide in 1..40i64, offset in 0..40i64, time in -1000..1000i64) {
            let slide = slide.min(size);
            let offset = offset % slide;
            let last = time - (time - offset).rem_euclid(slide);
            let expected: Vec<i64> = (0..(size as u64).div_ceil(slide as u64) as i64)
                .map(|i| last - i * slide)
                .filter(|start| time < start + size)
                .collect();
            prop_assert_eq!(utc(size, slide, offset).covering(time).starts, expected);
        }
    }
}
