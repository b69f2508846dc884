//! Slurm's compressed host lists: `node[01-04,7],gpu[1-2]x`.

use std::ops::RangeInclusive;

/// Expands the first `limit` hosts of `list`, in order; the last bracket of a name counts fastest.
///
/// The whole text is checked whatever `limit` is. Work and memory are bounded by `limit` and the
/// length of the text, not by the numbers in it.
///
/// # Errors
/// What is wrong with the text.
pub(super) fn expand(list: &str, limit: usize) -> Result<Vec<String>, &'static str> {
    let mut hosts = Vec::new();
    for item in split_outside_brackets(list)? {
        let parts = parse_item(item)?;
        combine(&parts, String::new(), limit, &mut hosts);
    }
    Ok(hosts)
}

/// A piece of a host name.
enum Part<'a> {
    Text(&'a str),
    Numbers(Vec<Numbers>),
}

/// Numbers in a bracket, printed with at least `width` digits.
struct Numbers {
    range: RangeInclusive<u64>,
    width: usize,
}

fn split_outside_brackets(list: &str) -> Result<Vec<&str>, &'static str> {
    let (mut items, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, byte) in list.bytes().enumerate() {
        match (byte, inside) {
            (b'[', false) => inside = true,
            (b'[', true) => return Err("a bracket opens inside a bracket"),
            (b']', true) => inside = false,
            (b']', false) => return Err("a bracket closes that is not open"),
            (b',', false) => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("a bracket is not closed");
    }
    items.push(&list[start..]);
    Ok(items)
}

fn parse_item(mut item: &str) -> Result<Vec<Part<'_>>, &'static str> {
    if item.is_empty() {
        return Err("a host name is empty");
    }
    let mut parts = Vec::new();
    while let Some((text, rest)) = item.split_once('[') {
        let (numbers, rest) = rest.split_once(']').ok_or("a bracket is not closed")?;
        parts.push(Part::Text(check_text(text)?));
        parts.push(Part::Numbers(numbers.split(',').map(parse_numbers).collect::<Result<_, _>>()?));
        item = rest;
    }
    parts.push(Part::Text(check_text(item)?));
    if parts.len() > MAX_PARTS {
        return Err("a host name has too many brackets");
    }
    Ok(parts)
}

fn check_text(text: &str) -> Result<&str, &'static str> {
    let fits = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    if fits { Ok(text) } else { Err("a host name has a character no host name has") }
}

fn parse_numbers(text: &str) -> Result<Numbers, &'static str> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let fits = plain && digits.len() <= MAX_DIGITS;
        digits.parse::<u64>().ok().filter(|_| fits).ok_or("a bracket holds something but numbers")
    };
    let range = number(low)?..=number(high)?;
    if range.is_empty() {
        return Err("a range in a bracket runs backwards");
    }
    Ok(Numbers { range, width: low.len() })
}

fn combine(parts: &[Part<'_>], host: String, limit: usize, hosts: &mut Vec<String>) {
    if hosts.len() >= limit {
        return;
    }
    match parts {
        [] => hosts.push(host),
        [Part::Text(text), rest @ ..] => combine(rest, host + text, limit, hosts),
        [Part::Numbers(list), rest @ ..] => {
            for Numbers { range, width } in list {
                // Each number gives at least one host, so no more than `limit` are of use.
                for number in range.clone().take(limit) {
                    combine(rest, format!("{host}{number:0width$}"), limit, hosts);
                }
            }
        }
    }
}

/// Bounds the recursion: text and bracket alternate.
const MAX_PARTS: usize = 33;
/// As many digits as always fit a `u64`.
const MAX_DIGITS: usize = 19;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_expand_as_scontrol_shows_them() {
        for (list, hosts) in [
            ("node7", "node7"),
            ("a,b", "a b"),
            ("node[01-03,7],gpu[1-2]x", "node01 node02 node03 node7 gpu1x gpu2x"),
            ("n[9-11]", "n9 n10 n11"),
            ("n[099-101]", "n099 n100 n101"),
            ("r[0-1]n[1-2]", "r0n1 r0n2 r1n1 r1n2"),
            ("ip-10-0-0-[5,7].ec2", "ip-10-0-0-5.ec2 ip-10-0-0-7.ec2"),
        ] {
            assert_eq!(expand(list, 100).unwrap().join(" "), hosts, "{list}");
        }
    }

    #[test]
    fn huge_ranges_cost_no_more_than_the_limit() {
        let hosts = expand("n[0-9999999999999999999],m[0-9]x[0-999999999]", 2).unwrap();
        assert_eq!(hosts, ["n0", "n1"]);
    }

    #[test]
    fn malformed_lists_are_refused() {
        for list in [
            "",
            ",",
            "a,",
            "a[",
            "a]",
            "a[]",
            "a[1",
            "a[1-]",
            "a[-1]",
            "a[2-1]",
            "a[x]",
            "a[1,]",
            "a[[1]]",
            "a b",
            "a[+1]",
            "a[18446744073709551616]",
            "ä",
        ] {
            assert!(expand(list, 10).is_err(), "{list}");
        }
        assert!(expand(&"[1]".repeat(40), 10).is_err());
    }

    proptest! {
        #[test]
        fn padded_ranges_expand_to_each_number(
            low in 0u64..2000,
            extra in 0u64..50,
            width in 1usize..6,
        ) {
            let hosts = expand(&format!("n[{low:0width$}-{}]", low + extra), 1000).unwrap();
            let expected: Vec<_> = (low..=low + extra).map(|i| format!("n{i:0width$}")).collect();
            prop_assert_eq!(hosts, expected);
        }
    }
}
