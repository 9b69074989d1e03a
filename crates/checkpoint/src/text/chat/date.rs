//! The date that a chat template may ask for with `strftime_now`.

/// A point in time, UTC, in the proleptic Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    days: i64,
    seconds: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// The first day of 1970 was a Thursday.
const WEEKDAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

impl DateTime {
    /// From seconds since the start of 1970.
    #[must_use]
    pub fn from_unix(seconds: i64) -> Self {
        Self {
            days: seconds.div_euclid(86_400),
            seconds: seconds.rem_euclid(86_400),
        }
    }

    /// Year, month (1 to 12), day of the month (from 1), day of the year (from 1).
    fn date(self) -> (i64, usize, i64, i64) {
        // Years from March on make the leap day the last one; 400 years have 146097 days.
        let shifted = self.days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day + 2) / 153;
        let day_of_month = day - (153 * month_from_march + 2) / 5 + 1;
        let month = (month_from_march + 2) % 12 + 1;
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let day_of_year = if month <= 2 {
            day - 305
        } else {
            day + 60 + i64::from(leap)
        };
        (year, month as usize, day_of_month, day_of_year)
    }

    /// Python's `strftime` in the C locale.
    ///
    /// # Errors
    /// A directive that is not known, with the list of those that are.
    pub(crate) fn strftime(self, format: &str) -> Result<String, String> {
        let mut text = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            let directive = chars.next().unwrap_or('%');
            text += &match directive {
                '-' => {
                    let plain = self.directive(chars.next().unwrap_or('%'))?;
                    let trimmed = plain.trim_start_matches('0');
                    if trimmed.is_empty() { "0" } else { trimmed }.to_owned()
                }
                other => self.directive(other)?,
            };
        }
        Ok(text)
    }

    fn directive(self, directive: char) -> Result<String, String> {
        let (year, month, day, day_of_year) = self.date();
        let weekday = WEEKDAYS[self.days.rem_euclid(7) as usize];
        let month_name = MONTHS[month - 1];
        let (hour, minute, second) = (
            self.seconds / 3600,
            self.seconds / 60 % 60,
            self.seconds % 60,
        );
        let hour_12 = (hour + 11) % 12 + 1;
        Ok(match directive {
            'Y' => format!("{year:04}"),
            'y' => format!("{:02}", year.rem_euclid(100)),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'j' => format!("{day_of_year:03}"),
            'B' => month_name.to_owned(),
            'b' | 'h' => month_name[..3].to_owned(),
            'A' => weekday.to_owned(),
            'a' => weekday[..3].to_owned(),
            'H' => format!("{hour:02}"),
            'I' => format!("{hour_12:02}"),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'F' => format!("{year:04}-{month:02}-{day:02}"),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'D' => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            'R' => format!("{hour:02}:{minute:02}"),
            'Z' | 'z' => String::new(),
            '%' => "%".to_owned(),
            other => {
                return Err(format!(
                    "strftime_now does not know %{other}; known: %Y %y %m %d %e %j %B %b %h %A %a \
                     %H %I %M %S %p %F %T %D %R %Z %z %%, and %- before one"
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // date -u -d @N '+%F %j %A %T'
        for (seconds, expected) in [
            (0, "1970-01-01 001 Thursday 00:00:00"),
            (951_782_400, "2000-02-29 060 Tuesday 00:00:00"),
            (1_735_689_599, "2024-12-31 366 Tuesday 23:59:59"),
            (1_753_444_800, "2025-07-25 206 Friday 12:00:00"),
            (4_107_542_400, "2100-03-01 060 Monday 00:00:00"),
            (-1, "1969-12-31 365 Wednesday 23:59:59"),
        ] {
            let date = DateTime::from_unix(seconds);
            assert_eq!(date.strftime("%F %j %A %T").unwrap(), expected);
        }
    }

    #[test]
    fn templates_get_the_spellings_they_ask_for() {
        let date = DateTime::from_unix(1_751_932_805);
        assert_eq!(
            date.strftime("%d %b %Y, %I:%M %p, 100%%").unwrap(),
            "08 Jul 2025, 12:00 AM, 100%"
        );
        assert_eq!(date.strftime("%B %-d, %y").unwrap(), "July 8, 25");
        let error = date.strftime("%Q").unwrap_err();
        assert!(error.contains("%Q") && error.contains("%Y"), "{error}");
    }
}
