//! Firmware's activity over time, as a picture.

use std::collections::BTreeMap;
use std::fmt::Write;

use firmware::exposure::{Kind, Record, Urgency};

use super::{Escaped, put};
use crate::exposures::{Exposures, denied, line, seconds, what};

/// Units of the picture, which the browser scales.
const WIDTH: u64 = 960;
const LEFT: u64 = 210;
const RIGHT: u64 = 20;
const LANE: u64 = 22;
const TOP: u64 = 10;
const BOTTOM: u64 = 24;
/// Narrowest mark: a call is short compared to the time a system runs.
const NARROW: u64 = 4;
/// Marks on the time axis, at most.
const TICKS: u64 = 8;

/// Draws a lane for each thing that happened, and a mark for each time that it did.
pub fn calls(page: &mut String, log: &Exposures) {
    let mut lanes: BTreeMap<(Kind, String), Vec<_>> = BTreeMap::new();
    for entry @ (_, record, _) in log.records() {
        lanes.entry((record.kind, what(record))).or_default().push(entry);
    }
    let ends = |record: &Record| record.time_us.saturating_add(record.duration_us.into());
    let starts = log.records().map(|(_, record, _)| record.time_us);
    let (Some(first), Some(last)) = (starts.min(), log.records().map(|(_, record, _)| ends(record)).max())
    else {
        return;
    };
    let span = last.saturating_sub(first).max(1);
    let plot = WIDTH.saturating_sub(LEFT).saturating_sub(RIGHT);
    // In 128 bits no time is too large, also none that a hostile log has.
    let scaled = |us: u64| {
        let units = u128::from(us).saturating_mul(plot.into()).checked_div(span.into());
        u64::try_from(units.unwrap_or_default()).unwrap_or(plot).min(plot)
    };
    let x = |us: u64| scaled(us.saturating_sub(first)).saturating_add(LEFT);
    let bottom = LANE.saturating_mul(lanes.len() as u64).saturating_add(TOP);
    let height = bottom.saturating_add(BOTTOM);
    put!(
        page,
        "<svg viewBox=\"0 0 {WIDTH} {height}\" font-size=11 role=img aria-label=\"firmware's activity over time\">"
    );
    let step = step(span);
    let mut tick = first.checked_next_multiple_of(step);
    while let Some(at) = tick.filter(|at| *at <= last) {
        let (x, label) = (x(at), seconds(at));
        let label = label.trim_end_matches('0').trim_end_matches('.');
        put!(page, "<line class=tick x1={x} x2={x} y1={TOP} y2={bottom} />");
        put!(page, "<text x={x} y={} text-anchor=middle>{label} s</text>", bottom.saturating_add(16));
        tick = at.checked_add(step);
    }
    for (lane, ((_, what), entries)) in (0_u64..).zip(&lanes) {
        let top = LANE.saturating_mul(lane).saturating_add(TOP);
        let middle = top.saturating_add(LANE / 2);
        put!(
            page,
            "<text x={} y={} text-anchor=end>{} × {}</text>",
            LEFT.saturating_sub(12),
            middle.saturating_add(4),
            Escaped(what),
            entries.len()
        );
        put!(
            page,
            "<line class=lane x1={LEFT} x2={} y1={middle} y2={middle} />",
            WIDTH.saturating_sub(RIGHT)
        );
        for (sequence, record, batch) in entries {
            let width = scaled(record.duration_us.into()).max(NARROW);
            put!(
                page,
                "<rect class=\"mark {}\" x={} y={} width={width} height={} rx=2><title>{}</title></rect>",
                class(record),
                x(record.time_us),
                top.saturating_add(4),
                LANE.saturating_sub(8),
                Escaped(line(*sequence, record, batch).trim_start()),
            );
        }
    }
    put!(page, "</svg>");
    put!(page, "<p class=legend>");
    for (class, text) in
        [("read", "reads"), ("write", "changes"), ("other", "no call"), ("bad", "denied or failed")]
    {
        put!(page, "<span><i style=\"background:var(--{class})\"></i>{text}</span>");
    }
    put!(page, "</p>");
}

/// A round distance between marks on the time axis.
fn step(span: u64) -> u64 {
    let least = span.div_ceil(TICKS).max(1);
    let power = 10_u64.saturating_pow(least.ilog10());
    [1, 2, 5, 10].map(|m| power.saturating_mul(m)).into_iter().find(|step| *step >= least).unwrap_or(u64::MAX)
}

/// The colour of a mark.
fn class(record: &Record) -> &'static str {
    match record.urgency() {
        Urgency::Batch { .. } => "read",
        Urgency::AtOnce if denied(record) != 0 || record.status >> 63 != 0 => "bad",
        Urgency::AtOnce if record.kind == Kind::CALL => "write",
        Urgency::AtOnce => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_has_few_round_marks() {
        for (span, expected) in
            [(1, 1), (8, 1), (9, 2), (100, 20), (1_000_000, 200_000), (3_600_000_000, 500_000_000)]
        {
            assert_eq!(step(span), expected, "{span}");
        }
        assert!(u64::MAX / step(u64::MAX) <= TICKS);
    }
}
