//! `dllm eval --plot`: accuracy against speed, as an SVG.

/// Units of the picture's width, as all below; the height grows when labels need it.
const WIDTH: f64 = 760.0;
/// Height of the area inside the axes, where there is room enough.
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;
/// A column of the labels' font, which is of fixed width, and the distance of its lines.
const COLUMN: f64 = 6.7;
const LINE: f64 = 14.0;
/// Columns and lines of a label at most: it has to fit into half the width, so that it does on one side of any point.
const COLUMNS: usize = 44;
const LINES: usize = 4;
/// Between a point and its label.
const GAP: f64 = 11.0;
const RADIUS: f64 = 4.0;

const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#24292f}
.label{font:11px ui-monospace,Menlo,'DejaVu Sans Mono',monospace;paint-order:stroke;stroke:#fff;stroke-width:3px}
.ground{fill:#fff}
.grid{stroke:#e4e7eb}
.axis,.leader{fill:none;stroke:#8c959f}
.bar{fill:none;stroke:#6e7781}
.front{fill:none;stroke:#0969da;stroke-dasharray:5 3}
circle{fill:#fff;stroke:#57606a;stroke-width:1.5px}
.best circle{fill:#0969da;stroke:#0969da}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}
.label{stroke:#0d1117}
.ground{fill:#0d1117}
.grid{stroke:#262c36}
.axis,.leader{stroke:#6e7681}
.bar{stroke:#8b949e}
.front{stroke:#58a6ff}
circle{fill:#0d1117;stroke:#9198a1}
.best circle{fill:#58a6ff;stroke:#58a6ff}
}
";

/// A setting, and what it came to.
pub struct Point {
    pub name: String,
    pub problems: usize,
    pub right: usize,
    pub tokens_per_second: f64,
}

impl Point {
    fn percent(&self) -> f64 {
        100.0 * self.right as f64 / self.problems as f64
    }

    /// Wilson's 95% interval of the accuracy, in percent.
    fn interval(&self) -> (f64, f64) {
        const Z: f64 = 1.959_964;
        let (n, share) = (self.problems as f64, self.right as f64 / self.problems as f64);
        let scale = 1.0 + Z * Z / n;
        let middle = (share + Z * Z / (2.0 * n)) / scale;
        let half = Z / scale * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
        (100.0 * (middle - half).max(0.0), 100.0 * (middle + half).min(1.0))
    }

    /// Better in one, and no worse in the other.
    fn beats(&self, other: &Point) -> bool {
        let (speed, others) = (self.tokens_per_second, other.tokens_per_second);
        let (percent, other) = (self.percent(), other.percent());
        speed >= others && percent >= other && (speed > others || percent > other)
    }
}

/// The picture of at least one setting, each with at least one problem.
pub fn svg(points: &[Point]) -> String {
    let x_axis = Axis::of_speeds(points);
    let y_axis = Axis::of_percents(points);
    let labels: Vec<Vec<String>> = points.iter().map(|p| lines(&p.name)).collect();
    let sizes: Vec<(f64, f64)> = labels.iter().map(|l| size(l)).collect();
    let front = front(points);
    let mut area = Area { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT };
    // Ends: any label fits beside its point (COLUMNS), and below or above the others once the area is high enough.
    let (marks, places) = loop {
        let mark = |p: &Point| {
            let y = |percent: f64| area.bottom() - y_axis.at(percent) * area.height;
            let (low, high) = p.interval();
            Mark {
                x: area.x + x_axis.at(p.tokens_per_second) * area.width,
                y: y(p.percent()),
                low: y(low),
                high: y(high),
            }
        };
        let marks: Vec<Mark> = points.iter().map(mark).collect();
        let bars = marks.iter().map(|m| ((m.x, m.low), (m.x, m.high)));
        let steps = front.windows(2).map(|pair| (&marks[pair[0]], &marks[pair[1]]));
        let steps = steps.flat_map(|(a, b)| [((a.x, a.y), (a.x, b.y)), ((a.x, b.y), (b.x, b.y))]);
        if let Some(places) = place(&marks, &bars.chain(steps).collect::<Vec<_>>(), &sizes, &area) {
            break (marks, places);
        }
        area.height *= 1.25;
    };
    let height = area.bottom() + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {WIDTH:.0} {height:.0}\" role=\"img\" aria-label=\"Accuracy against tokens per second\">\n\
         <style>\n{STYLE}</style>\n<rect class=\"ground\" width=\"100%\" height=\"100%\"/>\n"
    );
    svg += &axes(&x_axis, &y_axis, &area, points);
    if let [first, rest @ ..] = &front[..] {
        let steps: String = rest.iter().map(|i| format!(" V{:.1} H{:.1}", marks[*i].y, marks[*i].x)).collect();
        svg += &format!("<path class=\"front\" d=\"M{:.1} {:.1}{steps}\"/>\n", marks[*first].x, marks[*first].y);
    }
    for (mark, place) in marks.iter().zip(&places) {
        if let Some((from, to)) = leader(mark, place) {
            svg += &format!("<path class=\"leader\" d=\"M{:.1} {:.1} L{:.1} {:.1}\"/>\n", from.0, from.1, to.0, to.1);
        }
    }
    for (i, (point, mark)) in points.iter().zip(&marks).enumerate() {
        svg += &dot(point, mark, front.contains(&i));
    }
    for ((lines, mark), place) in labels.iter().zip(&marks).zip(&places) {
        svg += &label(lines, mark, place);
    }
    svg + "</svg>\n"
}

/// Grid, ticks and what the axes mean.
fn axes(x_axis: &Axis, y_axis: &Axis, area: &Area, points: &[Point]) -> String {
    let (left, right, top, bottom) = (area.x, area.right(), area.y, area.bottom());
    let mut svg = String::new();
    for (value, tick) in x_axis.ticks() {
        let x = left + x_axis.at(value) * area.width;
        svg += &format!("<path class=\"grid\" d=\"M{x:.1} {top:.1} V{bottom:.1}\"/>\n");
        svg += &format!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>\n", bottom + 17.0);
    }
    for (value, tick) in y_axis.ticks() {
        let y = bottom - y_axis.at(value) * area.height;
        svg += &format!("<path class=\"grid\" d=\"M{left:.1} {y:.1} H{right:.1}\"/>\n");
        svg += &format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}%</text>\n", left - 6.0, y + 4.0);
    }
    let least = points.iter().map(|p| p.problems).min().unwrap_or(0);
    let most = points.iter().map(|p| p.problems).max().unwrap_or(0);
    let problems =
        if least == most { crate::report::count(most, "problem") } else { format!("{least} to {most} problems") };
    let scale = if x_axis.log { " (log scale)" } else { "" };
    svg += &format!("<path class=\"axis\" d=\"M{left:.1} {top:.1} V{bottom:.1} H{right:.1}\"/>\n");
    svg += &format!(
        "<text x=\"8\" y=\"19\">accuracy, {problems}; bars: 95% interval (Wilson); filled: Pareto front</text>\n"
    );
    svg += &format!(
        "<text x=\"{right:.1}\" y=\"{:.1}\" text-anchor=\"end\">tokens/s{scale}</text>\n",
        bottom + BOTTOM - 10.0
    );
    svg
}

/// A setting's point and interval; the numbers show when pointed at.
fn dot(point: &Point, mark: &Mark, best: bool) -> String {
    let ((low, high), Mark { x, y, .. }) = (point.interval(), mark);
    let (left, right) = (x - 3.0, x + 3.0);
    format!(
        "<g class=\"point{}\"><title>{}: {:.1}% of {} ({low:.1}% to {high:.1}%), {:.1} tokens/s</title>\
         <path class=\"bar\" d=\"M{x:.1} {:.1} V{:.1} M{left:.1} {:.1} H{right:.1} M{left:.1} {:.1} H{right:.1}\"/>\
         <circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{RADIUS}\"/></g>\n",
        if best { " best" } else { "" },
        escape(&point.name),
        point.percent(),
        point.problems,
        point.tokens_per_second,
        mark.low,
        mark.high,
        mark.low,
        mark.high,
    )
}

fn label(lines: &[String], mark: &Mark, place: &Area) -> String {
    // Anchored at the point's side, whatever width the font really has.
    let (x, anchor) = if place.x > mark.x { (place.x, "start") } else { (place.right(), "end") };
    let line = |(i, line): (usize, &String)| {
        let y = place.y + LINE * (i as f64 + 0.75);
        format!("<tspan x=\"{x:.1}\" y=\"{y:.1}\">{}</tspan>", escape(line))
    };
    let lines: String = lines.iter().enumerate().map(line).collect();
    format!("<text class=\"label\" text-anchor=\"{anchor}\">{lines}</text>\n")
}

/// What is between the ends of an axis, and how it is divided.
#[derive(Debug)]
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn of_speeds(points: &[Point]) -> Axis {
        let speeds = || points.iter().map(|p| p.tokens_per_second);
        let (low, high) = (speeds().fold(f64::INFINITY, f64::min), speeds().fold(0.0, f64::max));
        if low > 0.0 && high > 4.0 * low {
            let margin = (high / low).powf(0.06);
            return Axis { low: low / margin, high: high * margin, log: true };
        }
        let margin = (0.06 * (high - low)).max(0.05 * high).max(1e-9);
        Axis { low: (low - margin).max(0.0), high: high + margin, log: false }
    }

    fn of_percents(points: &[Point]) -> Axis {
        let low = points.iter().map(|p| p.interval().0).fold(100.0, f64::min);
        let high = points.iter().map(|p| p.interval().1).fold(0.0, f64::max);
        let margin = 0.05 * (high - low);
        Axis { low: (low - margin).max(0.0), high: (high + margin).min(100.0), log: false }
    }

    /// Where the value is, from 0 at the low end to 1 at the high one.
    fn at(&self, value: f64) -> f64 {
        let scale = |v: f64| if self.log { v.log10() } else { v };
        (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    }

    /// Round numbers from end to end, and as they are written.
    fn ticks(&self) -> Vec<(f64, String)> {
        let decimals = |exponent: i32| usize::try_from(-exponent).unwrap_or(0);
        if self.log {
            let exponents = || self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let ticks = |digits: &[f64]| -> Vec<(f64, String)> {
                let all = exponents().flat_map(|e| digits.iter().map(move |d| (e, d * 10f64.powi(e))));
                let inside = all.filter(|(_, value)| (self.low..=self.high).contains(value));
                inside.map(|(e, value)| (value, format!("{value:.0$}", decimals(e)))).collect()
            };
            let fine = ticks(&[1.0, 2.0, 5.0]);
            return if fine.len() > 10 { ticks(&[1.0]) } else { fine };
        }
        let about = (self.high - self.low) / 5.0;
        let exponent = about.log10().floor() as i32;
        let power = 10f64.powi(exponent);
        let (digit, exponent) = match about / power {
            ..=1.0 => (1.0, exponent),
            ..=2.0 => (2.0, exponent),
            ..=5.0 => (5.0, exponent),
            _ => (10.0, exponent + 1),
        };
        let step = digit * power;
        let (first, last) = ((self.low / step - 1e-9).ceil() as i64, (self.high / step + 1e-9).floor() as i64);
        (first..=last).map(|i| (i as f64 * step, format!("{:.1$}", i as f64 * step, decimals(exponent)))).collect()
    }
}

/// The settings that no other beats, from the slowest to the fastest.
fn front(points: &[Point]) -> Vec<usize> {
    let beaten = |i: &usize| points.iter().any(|other| other.beats(&points[*i]));
    let mut front: Vec<usize> = (0..points.len()).filter(|i| !beaten(i)).collect();
    front.sort_by(|a, b| points[*a].tokens_per_second.total_cmp(&points[*b].tokens_per_second));
    front
}

/// Where a setting is in the picture: its point, and the ends of its interval.
#[derive(Debug)]
struct Mark {
    x: f64,
    y: f64,
    low: f64,
    high: f64,
}

/// From here to there.
type Line = ((f64, f64), (f64, f64));

#[derive(Clone, Debug, PartialEq)]
struct Area {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
}

impl Area {
    fn right(&self) -> f64 {
        self.x + self.width
    }

    fn bottom(&self) -> f64 {
        self.y + self.height
    }

    fn overlaps(&self, other: &Area) -> bool {
        self.x < other.right() && other.x < self.right() && self.y < other.bottom() && other.y < self.bottom()
    }

    /// Whether a line passes through: some part of it is between the sides both ways.
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

/// The line from a point to a label that is not beside it.
fn leader(mark: &Mark, place: &Area) -> Option<Line> {
    let to = (if place.x > mark.x { place.x - 2.0 } else { place.right() + 2.0 }, place.y + place.height / 2.0);
    ((to.1 - mark.y).abs() > LINE / 2.0).then_some(((mark.x, mark.y), to))
}

/// A place for each label, from the top point down: right or left of it, at its height or as near as others leave room.
/// No two overlap, and all are in the area; points, strokes and leaders are kept free where that is not far. `None`
/// where labels find no room.
fn place(marks: &[Mark], strokes: &[Line], sizes: &[(f64, f64)], area: &Area) -> Option<Vec<Area>> {
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

/// Columns that a character takes in a font of fixed width, at most.
fn columns(c: char) -> usize {
    if c < '\u{1100}' { 1 } else { 2 }
}

/// A name in lines that fit, broken behind commas where it has some. The rest of a very long one is left out.
fn lines(name: &str) -> Vec<String> {
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

fn size(lines: &[String]) -> (f64, f64) {
    let columns = lines.iter().map(|line| line.chars().map(columns).sum::<usize>()).max().unwrap_or(0);
    (columns as f64 * COLUMN, lines.len() as f64 * LINE)
}

/// As text of XML, which has no control characters.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '&' => escaped += "&amp;",
            '"' => escaped += "&quot;",
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push(char::REPLACEMENT_CHARACTER),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, right: usize, tokens_per_second: f64) -> Point {
        Point { name: name.into(), problems: 100, right, tokens_per_second }
    }

    /// As the six usual settings come out.
    fn six() -> Vec<Point> {
        let mut six = Vec::new();
        for (policy, scores) in [
            ("fixed", [(94, 76.0), (95, 159.0), (95, 212.0)]),
            ("threshold,threshold=0.9", [(78, 670.0), (83, 1035.0), (83, 1226.0)]),
        ] {
            for (cache, (right, speed)) in ["none", "prefix", "dual"].into_iter().zip(scores) {
                six.push(point(&format!("cache={cache},policy={policy}"), right, speed));
            }
        }
        six
    }

    fn ticks(low: f64, high: f64, log: bool) -> String {
        let ticks = Axis { low, high, log }.ticks();
        ticks.into_iter().map(|(_, tick)| tick).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.0, 100.0, false), "0 20 40 60 80 100");
        assert_eq!(ticks(61.3, 98.9, false), "70 80 90");
        assert_eq!(ticks(94.2, 96.8, false), "95 96");
        assert_eq!(ticks(99.61, 100.0, false), "99.7 99.8 99.9 100.0");
        assert_eq!(ticks(95.0, 105.0, false), "96 98 100 102 104");
        assert_eq!(ticks(70.0, 1300.0, true), "100 200 500 1000");
        assert_eq!(ticks(0.015, 0.3, true), "0.02 0.05 0.1 0.2");
        assert_eq!(ticks(0.5, 20000.0, true), "1 10 100 1000 10000");
    }

    /// Few, equal, none right, all right: every axis has an extent and at least two ticks.
    #[test]
    fn axes_of_anything() {
        for points in [
            vec![point("a", 100, 80.0)],
            vec![point("a", 0, 80.0)],
            vec![point("a", 0, 0.0)],
            vec![point("a", 50, 80.0), point("b", 50, 80.0)],
            vec![point("a", 50, 0.0), point("b", 100, 80.0)],
            vec![point("a", 50, 79.999_999_999), point("b", 50, 80.0)],
            vec![point("a", 50, 20.0), point("b", 50, 80.001)],
            vec![point("a", 50, 1e-3), point("b", 50, 1e9)],
        ] {
            for (axis, values) in [
                (Axis::of_speeds(&points), points.iter().map(|p| p.tokens_per_second).collect::<Vec<_>>()),
                (Axis::of_percents(&points), points.iter().map(Point::percent).collect()),
            ] {
                assert!(axis.ticks().len() >= 2, "{axis:?}: {:?}", axis.ticks());
                assert!(values.iter().all(|v| (0.0..=1.0).contains(&axis.at(*v))), "{axis:?}: {values:?}");
            }
            let svg = svg(&points);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        assert!(Axis::of_speeds(&six()).log && !Axis::of_speeds(&six()[..2]).log);
    }

    #[test]
    fn intervals() {
        let interval = |right| {
            let (low, high) = point("", right, 1.0).interval();
            format!("{low:.1} {high:.1}")
        };
        assert_eq!(interval(95), "88.8 97.8");
        assert_eq!(interval(0), "0.0 3.7");
        assert_eq!(interval(100), "96.3 100.0");
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        assert_eq!(front(&six()), [2, 5]);
        // As good in one and better in the other beats; as good in both does not.
        let points = [point("", 90, 50.0), point("", 90, 40.0), point("", 80, 50.0), point("", 90, 50.0)];
        assert_eq!(front(&points), [0, 3]);
        assert_eq!(front(&[point("", 80, 60.0), point("", 90, 50.0), point("", 70, 70.0)]), [1, 0, 2]);
    }

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
    fn names_are_text() {
        assert_eq!(escape("a<b>&\"c\"\u{7}"), "a&lt;b&gt;&amp;&quot;c&quot;\u{fffd}");
        let tags = |name: &str| svg(&[point(name, 1, 1.0)]).matches('<').count();
        assert_eq!(tags("</text><&\"]]>"), tags("harmless"));
        assert_eq!(lines("cache=prefix,policy=threshold,threshold=0.9").len(), 1);
        let long = "cache=adaptive,policy=fixed,prompt-interval=25,response-interval=2";
        assert_eq!(lines(long), ["cache=adaptive,policy=fixed,", "prompt-interval=25,response-interval=2"]);
        assert_eq!(lines(&"x".repeat(100)).iter().map(String::len).collect::<Vec<_>>(), [44, 44, 12]);
        let cut = lines(&"数,".repeat(1000));
        assert!(cut.len() == LINES && cut[3].ends_with('…') && size(&cut).0 <= (WIDTH - LEFT - RIGHT) / 2.0 - GAP);
    }

    /// Labels as they are in the picture: anchor and lines.
    fn boxes(svg: &str) -> Vec<Area> {
        let value = |text: &str, name: &str| -> f64 {
            let (_, after) = text.split_once(&format!(" {name}=\"")).unwrap();
            after.split_once('"').unwrap().0.parse().unwrap()
        };
        let label = |text: &str| {
            let text = text.split_once("</text>").unwrap().0;
            let spans: Vec<&str> = text.split("<tspan").skip(1).collect();
            let text_of = |span: &&str| span.split(['>', '<']).nth(1).unwrap().to_string();
            let (width, height) = size(&spans.iter().map(text_of).collect::<Vec<_>>());
            let x = value(spans[0], "x") - if text.contains("\"end\"") { width } else { 0.0 };
            Area { x, y: value(spans[0], "y") - 0.75 * LINE, width, height }
        };
        svg.split("<text class=\"label\"").skip(1).map(label).collect()
    }

    fn check_labels(points: &[Point]) {
        let svg = svg(points);
        let height: f64 = svg.split("height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
        let boxes = boxes(&svg);
        assert_eq!(boxes.len(), points.len());
        for (i, one) in boxes.iter().enumerate() {
            // To the tenth that is written.
            let inside = one.x > LEFT - 0.1 && one.right() < WIDTH - RIGHT + 0.1;
            assert!(
                inside && one.y > TOP - 0.1 && one.bottom() < height - BOTTOM + 0.6,
                "{one:?} of {}",
                points[i].name
            );
            let smaller = Area { x: one.x + 0.1, y: one.y + 0.1, width: one.width - 0.2, height: one.height - 0.2 };
            assert!(boxes[..i].iter().all(|other| !smaller.overlaps(other)), "{one:?} in {boxes:?}");
        }
    }

    #[test]
    fn labels_are_inside_and_apart() {
        check_labels(&six());
        check_labels(&six()[..1]);
        // Everything in one place; more than the usual height holds; long names in different lengths.
        let same = |n: usize, name: &dyn Fn(usize) -> String| -> Vec<Point> {
            (0..n).map(|i| point(&name(i), 100, 80.0)).collect()
        };
        check_labels(&same(6, &|_| "cache=prefix,policy=threshold,threshold=0.9".into()));
        check_labels(&same(80, &|_| "cache=prefix,policy=threshold,threshold=0.9".into()));
        check_labels(&same(30, &|i| "prompt-interval=100,".repeat(1 + i % 9)));
        // Anywhere.
        let mut state = 1u64;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..30 {
            let n = 1 + next(12);
            let mut random =
                || point(&"threshold=0.95,".repeat(1 + next(4) as usize), next(101) as usize, 1.0 + next(500) as f64);
            check_labels(&(0..n).map(|_| random()).collect::<Vec<_>>());
        }
    }
}
