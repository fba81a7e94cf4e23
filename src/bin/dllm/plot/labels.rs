//! Labels of the plot: line breaks, and placement without overlaps.

use super::RADIUS;

/// Width of a column of the fixed-width font.
const COLUMN: f64 = 6.7;
/// Distance of lines.
pub const LINE: f64 = 14.0;
/// Maximum columns of a label: it must fit into half of the width, so that one side of every point has room.
const COLUMNS: usize = 44;
/// Maximum lines of a label.
const LINES: usize = 4;
/// Distance of a point and its label.
const GAP: f64 = 11.0;

/// Coordinates of a setting: its point, and the ends of its interval.
#[derive(Debug)]
pub struct Mark {
    pub x: f64,
    pub y: f64,
    pub low: f64,
    pub high: f64,
}

/// Straight line between two points.
pub type Line = ((f64, f64), (f64, f64));

/// Rectangle; `y` grows downwards.
#[derive(Clone, Debug, PartialEq)]
pub struct Area {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

impl Area {
    pub fn right(&self) -> f64 {
        self.x + self.width
    }

    pub fn bottom(&self) -> f64 {
        self.y + self.height
    }

    pub fn overlaps(&self, other: &Area) -> bool {
        self.x < other.right() && other.x < self.right() && self.y < other.bottom() && other.y < self.bottom()
    }

    /// Returns whether a part of the line is inside.
    fn is_crossed(&self, (from, to): Line) -> bool {
        let (mut enters, mut leaves) = (0.0f64, 1.0f64);
        for (start, end, low, high) in [(from.0, to.0, self.x, self.right()), (from.1, to.1, self.y, self.bottom())] {
            if start == end {
                if start <= low || start >= high {
                    return false;
                }
                continue;
            }
            let (a, b) = ((low - start) / (end - start), (high - start) / (end - start));
            (enters, leaves) = (enters.max(a.min(b)), leaves.min(a.max(b)));
        }
        enters < leaves
    }
}

/// Returns the line from a point to its label, if the label is not at the height of the point.
pub fn leader(mark: &Mark, place: &Area) -> Option<Line> {
    let to = (if place.x > mark.x { place.x - 2.0 } else { place.right() + 2.0 }, place.y + place.height / 2.0);
    ((to.1 - mark.y).abs() > LINE / 2.0).then_some(((mark.x, mark.y), to))
}

/// Places the labels, from the top point down, to the right or left of their points and near their heights.
///
/// Labels do not overlap, and all are inside `area`. Overlaps with points, `strokes` and leaders count as a distance.
/// Returns `None` if a label has no room.
pub fn place_labels(marks: &[Mark], strokes: &[Line], sizes: &[(f64, f64)], area: &Area) -> Option<Vec<Area>> {
    let mut order: Vec<usize> = (0..marks.len()).collect();
    order.sort_by(|a, b| marks[*a].y.total_cmp(&marks[*b].y));
    let mut placed: Vec<(usize, Area)> = Vec::new();
    for i in order {
        let (mark, (width, height)) = (&marks[i], sizes[i]);
        let cost = |place: &Area| {
            let line = leader(mark, place);
            let mut cost = (place.y + height / 2.0 - mark.y).abs();
            for other in marks {
                let (x, y, r) = (other.x, other.y, RADIUS + 2.0);
                let dot = Area { x: x - r, y: y - r, width: 2.0 * r, height: 2.0 * r };
                cost += if place.overlaps(&dot) { 60.0 } else { 0.0 };
            }
            cost += 20.0 * strokes.iter().filter(|stroke| place.is_crossed(**stroke)).count() as f64;
            for (j, other) in &placed {
                let crosses = |line: Option<Line>, area: &Area| line.is_some_and(|line| area.is_crossed(line));
                let crossed = crosses(line, other) || crosses(leader(&marks[*j], other), place);
                cost += if crossed { 40.0 } else { 0.0 };
            }
            cost
        };
        let rows = ((area.height - height) / 2.0).max(-1.0).floor() as i64;
        let best = [mark.x + GAP, mark.x - GAP - width]
            .into_iter()
            .filter(|x| *x >= area.x && x + width <= area.right())
            .flat_map(|x| (0..=rows).map(move |row| Area { x, y: area.y + 2.0 * row as f64, width, height }))
            .filter(|place| placed.iter().all(|(_, other)| !place.overlaps(other)))
            .map(|place| (cost(&place), place))
            .min_by(|a, b| a.0.total_cmp(&b.0))?;
        placed.push((i, best.1));
    }
    placed.sort_by_key(|(i, _)| *i);
    Some(placed.into_iter().map(|(_, place)| place).collect())
}

/// Returns the maximum columns of a character in a fixed-width font.
fn columns(c: char) -> usize {
    if c < '\u{1100}' { 1 } else { 2 }
}

/// Wraps a name to lines, after commas where possible. A very long name is truncated.
pub fn lines(name: &str) -> Vec<String> {
    let wide = |text: &str| text.chars().map(columns).sum::<usize>();
    let mut lines = vec![];
    let mut line = String::new();
    for part in name.split_inclusive(',') {
        if wide(&line) + wide(part) > COLUMNS && !line.is_empty() {
            lines.push(std::mem::take(&mut line));
        }
        for c in part.chars() {
            if wide(&line) + columns(c) > COLUMNS {
                lines.push(std::mem::take(&mut line));
            }
            line.push(c);
        }
    }
    lines.push(line);
    if lines.len() > LINES {
        lines.truncate(LINES);
        lines[LINES - 1].pop();
        lines[LINES - 1].push('…');
    }
    lines
}

/// Returns width and height of a label.
pub fn size(lines: &[String]) -> (f64, f64) {
    let columns = lines.iter().map(|line| line.chars().map(columns).sum::<usize>()).max().unwrap_or(0);
    (columns as f64 * COLUMN, lines.len() as f64 * LINE)
}

#[cfg(test)]
mod tests {
    use super::super::{LEFT, RIGHT, WIDTH};
    use super::*;

    #[test]
    fn lines_through_areas() {
        let area = Area { x: 10.0, y: 20.0, width: 30.0, height: 5.0 };
        for (line, crossed) in [
            (((20.0, 0.0), (20.0, 100.0)), true),
            (((20.0, 100.0), (20.0, 23.0)), true),
            (((20.0, 0.0), (20.0, 20.0)), false),
            (((10.0, 0.0), (10.0, 100.0)), false),
            (((0.0, 22.0), (9.0, 22.0)), false),
            (((0.0, 22.0), (50.0, 23.0)), true),
            (((0.0, 0.0), (50.0, 100.0)), true),
            (((0.0, 15.0), (14.0, 29.0)), false),
            (((12.0, 22.0), (13.0, 23.0)), true),
        ] {
            assert_eq!(area.is_crossed(line), crossed, "{line:?}");
        }
    }

    #[test]
    fn names_are_wrapped() {
        assert_eq!(lines("cache=prefix,policy=threshold,threshold=0.9").len(), 1);
        let long = "cache=adaptive,policy=fixed,prompt-interval=25,response-interval=2";
        assert_eq!(lines(long), ["cache=adaptive,policy=fixed,", "prompt-interval=25,response-interval=2"]);
        assert_eq!(lines(&"x".repeat(100)).iter().map(String::len).collect::<Vec<_>>(), [44, 44, 12]);
        let cut = lines(&"数,".repeat(1000));
        assert!(cut.len() == LINES && cut[3].ends_with('…') && size(&cut).0 <= (WIDTH - LEFT - RIGHT) / 2.0 - GAP);
    }
}
