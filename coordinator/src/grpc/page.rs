//! Pages of a listing. A token is opaque to callers; it says after which item to go on, and is bound to the
//! listing and its filters by a checksum.

use crate::error::{CoordinatorError, Result};
use std::fmt::Write as _;

/// Items of a page, if the caller does not say.
const DEFAULT: u32 = 100;
/// Items of a page at most.
const MOST: u32 = 1000;

/// Bytes of a page at most, unless one item alone has more. Clients take messages of 4 MiB.
const MOST_BYTES: usize = 3 << 20;

/// The room that a page has left.
pub struct Room(usize);

impl Room {
    /// An empty page's.
    pub fn new() -> Self {
        Self(MOST_BYTES)
    }

    /// Takes the room that an item needs, if it is there; the first item's always is.
    pub fn take(&mut self, bytes: usize) -> bool {
        let fits = self.0 == MOST_BYTES || bytes <= self.0;
        if fits {
            self.0 = self.0.saturating_sub(bytes.max(1));
        }
        fits
    }
}

/// Items that a page has at most.
pub fn size(asked: u32) -> usize {
    (if asked == 0 { DEFAULT } else { asked.min(MOST) }) as usize
}

/// The token of a page that begins after `position`, in a listing that `listing` names with its filters.
pub fn token(listing: &str, position: &str) -> String {
    let mut token = format!("{:08x}", checksum(listing, position));
    for byte in position.bytes() {
        // Writing to a string does not fail.
        let _ = write!(token, "{byte:02x}");
    }
    token
}

/// The position in a token; `None` for the first page.
pub fn position(listing: &str, token: &str) -> Result<Option<String>> {
    if token.is_empty() {
        return Ok(None);
    }
    match decode(token) {
        Some((sum, position)) if sum == checksum(listing, &position) => Ok(Some(position)),
        _ => Err(CoordinatorError::invalid(
            "page_token",
            "is not one that this listing gave; pass `next_page_token` of the page before, with the same filters",
        )),
    }
}

fn checksum(listing: &str, position: &str) -> u32 {
    crc32fast::hash(format!("{listing}\0{position}").as_bytes())
}

fn decode(token: &str) -> Option<(u32, String)> {
    if !token.is_ascii() || !token.len().is_multiple_of(2) {
        return None;
    }
    let (sum, position) = token.split_at_checked(8)?;
    let bytes = (0..position.len()).step_by(2).map(|i| u8::from_str_radix(&position[i..i + 2], 16));
    let bytes = bytes.collect::<std::result::Result<_, _>>().ok()?;
    Some((u32::from_str_radix(sum, 16).ok()?, String::from_utf8(bytes).ok()?))
}

/// A page of items that are all at hand: those after the token's position, in order, and the next token.
pub fn of<T>(
    listing: &str,
    token: &str,
    asked: u32,
    items: impl IntoIterator<Item = T>,
    position_of: impl Fn(&T) -> String,
    bytes_of: impl Fn(&T) -> usize,
) -> Result<(Vec<T>, String)> {
    let mut items = items.into_iter().peekable();
    if let Some(last) = position(listing, token)? {
        items.by_ref().find(|item| position_of(item) == last);
    }
    let (mut page, mut room) = (Vec::new(), Room::new());
    while page.len() < size(asked)
        && let Some(item) = items.next_if(|item| room.take(bytes_of(item)))
    {
        page.push(item);
    }
    let next = match (page.last(), items.peek()) {
        (Some(last), Some(_)) => self::token(listing, &position_of(last)),
        _ => String::new(),
    };
    Ok((page, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_without_gap_or_repetition() {
        for (items, size) in [(0, 2), (1, 2), (2, 2), (3, 2), (7, 3), (6, 3), (5, 0)] {
            let (mut seen, mut token, mut pages) = (Vec::new(), String::new(), 0);
            loop {
                let (page, next) = of("l", &token, size, 0..items, u32::to_string, |_| 0).unwrap();
                seen.extend(page);
                pages += 1;
                if next.is_empty() {
                    break;
                }
                token = next;
            }
            assert_eq!(seen, (0..items).collect::<Vec<_>>());
            let size = if size == 0 { 100 } else { size };
            assert_eq!(pages, items.div_ceil(size).max(1), "{items} items by {size}");
        }
    }

    #[test]
    fn pages_are_bounded_by_bytes() {
        for (bytes, want) in
            [(30, vec![5]), (1 << 20, vec![3, 2]), (2 << 20, vec![1; 5]), (9 << 20, vec![1; 5])]
        {
            let items = (0..5).map(|i| format!("{i}{}", "x".repeat(bytes - 20)));
            let items: Vec<_> = items.collect();
            let (mut sizes, mut token) = (Vec::new(), String::new());
            loop {
                let position = |item: &String| item[..1].to_string();
                let (page, next) = of("l", &token, 0, items.clone(), position, String::len).unwrap();
                sizes.push(page.len());
                token = next;
                if token.is_empty() {
                    break;
                }
            }
            assert_eq!(sizes, want, "{bytes} bytes each");
        }
    }

    #[test]
    fn foreign_tokens_are_refused() {
        let good = token("trials s running", "12");
        assert_eq!(position("trials s running", &good).unwrap().as_deref(), Some("12"));
        for (listing, token) in [
            ("trials s", good.as_str()),
            ("trials s running", "12"),
            ("trials s running", "xyz"),
            ("trials s running", "é"),
            ("trials s running", &good[2..]),
            ("trials s running", &good.replace('3', "4")),
        ] {
            assert!(position(listing, token).is_err(), "{listing} {token}");
        }
    }

    #[test]
    fn sizes() {
        for (asked, want) in [(0, 100), (1, 1), (1000, 1000), (1001, 1000)] {
            assert_eq!(size(asked), want);
        }
    }
}
