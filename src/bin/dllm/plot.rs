//! `dllm eval --plot`: draws accuracy against speed as an SVG.

mod axis;
mod labels;

use axis::Axis;
use labels::{Area, LINE, Mark, leader, lines, place_labels, size};

/// Width of the picture, in the units of all lengths. The height grows if labels need it.
const WIDTH: f64 = 760.0;
/// Minimum height of the area inside the axes.
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 46.0;
/// Radius of a point.
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

/// Result of a setting.
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

    /// Returns Wilson's 95% interval of the accuracy, in percent.
    fn interval(&self) -> (f64, f64) {
        const Z: f64 = 1.959_964;
        let (n, share) = (self.problems as f64, self.right as f64 / self.problems as f64);
        let scale = 1.0 + Z * Z / n;
        let middle = (share + Z * Z / (2.0 * n)) / scale;
        let half = Z / scale * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
        (100.0 * (middle - half).max(0.0), 100.0 * (middle + half).min(1.0))
    }

    /// Returns whether speed or accuracy is better than that of `other`, and neither is worse.
    fn beats(&self, other: &Point) -> bool {
        let (speed, others) = (self.tokens_per_second, other.tokens_per_second);
        let (percent, other) = (self.percent(), other.percent());
        speed >= others && percent >= other && (speed > others || percent > other)
    }
}

/// Draws at least one setting, each with at least one problem.
pub fn svg(points: &[Point]) -> String {
    let (x_axis, y_axis) = (Axis::for_speeds(points), Axis::for_percents(points));
    let labels: Vec<Vec<String>> = points.iter().map(|p| lines(&p.name)).collect();
    let sizes: Vec<(f64, f64)> = labels.iter().map(|l| size(l)).collect();
    let front = front(points);
    let mut area = Area { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT };
    // The loop ends: each label has room next to its point (COLUMNS), and above or below the others once the area is high
    // enough.
    let (marks, places) = loop {
        let mark = |p: &Point| {
            let y = |percent: f64| area.bottom() - y_axis.position(percent) * area.height;
            let (low, high) = p.interval();
            Mark {
                x: area.x + x_axis.position(p.tokens_per_second) * area.width,
                y: y(p.percent()),
                low: y(low),
                high: y(high),
            }
        };
        let marks: Vec<Mark> = points.iter().map(mark).collect();
        let bars = marks.iter().map(|m| ((m.x, m.low), (m.x, m.high)));
        let steps = front.windows(2).map(|pair| (&marks[pair[0]], &marks[pair[1]]));
        let steps = steps.flat_map(|(a, b)| [((a.x, a.y), (a.x, b.y)), ((a.x, b.y), (b.x, b.y))]);
        if let Some(places) = place_labels(&marks, &bars.chain(steps).collect::<Vec<_>>(), &sizes, &area) {
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

/// Draws grid, ticks and titles of the axes.
fn axes(x_axis: &Axis, y_axis: &Axis, area: &Area, points: &[Point]) -> String {
    let (left, right, top, bottom) = (area.x, area.right(), area.y, area.bottom());
    let mut svg = String::new();
    for (value, tick) in x_axis.ticks() {
        let x = left + x_axis.position(value) * area.width;
        svg += &format!("<path class=\"grid\" d=\"M{x:.1} {top:.1} V{bottom:.1}\"/>\n");
        svg += &format!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>\n", bottom + 17.0);
    }
    for (value, tick) in y_axis.ticks() {
        let y = bottom - y_axis.position(value) * area.height;
        svg += &format!("<path class=\"grid\" d=\"M{left:.1} {y:.1} H{right:.1}\"/>\n");
        svg += &format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{tick}%</text>\n", left - 6.0, y + 4.0);
    }
    let fewest = points.iter().map(|p| p.problems).min().unwrap_or(0);
    let most = points.iter().map(|p| p.problems).max().unwrap_or(0);
    let problems =
        if fewest == most { crate::report::count(most, "problem") } else { format!("{fewest} to {most} problems") };
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

/// Draws point and interval of a setting, with the numbers as a tooltip.
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

/// Draws a label.
fn label(lines: &[String], mark: &Mark, place: &Area) -> String {
    // Anchored at the side of the point, so that the real width of the font does not matter.
    let (x, anchor) = if place.x > mark.x { (place.x, "start") } else { (place.right(), "end") };
    let line = |(i, line): (usize, &String)| {
        let y = place.y + LINE * (i as f64 + 0.75);
        format!("<tspan x=\"{x:.1}\" y=\"{y:.1}\">{}</tspan>", escape(line))
    };
    let lines: String = lines.iter().enumerate().map(line).collect();
    format!("<text class=\"label\" text-anchor=\"{anchor}\">{lines}</text>\n")
}

/// Returns the Pareto front, from the slowest setting to the fastest.
fn front(points: &[Point]) -> Vec<usize> {
    let beaten = |i: &usize| points.iter().any(|other| other.beats(&points[*i]));
    let mut front: Vec<usize> = (0..points.len()).filter(|i| !beaten(i)).collect();
    front.sort_by(|a, b| points[*a].tokens_per_second.total_cmp(&points[*b].tokens_per_second));
    front
}

/// Escapes text for XML; control characters are replaced.
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

    /// Typical results of the default settings.
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

    /// One point, equal points, accuracy 0 and 1: every axis has an extent and at least two ticks.
    #[test]
    fn axes_of_extreme_results() {
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
                (Axis::for_speeds(&points), points.iter().map(|p| p.tokens_per_second).collect::<Vec<_>>()),
                (Axis::for_percents(&points), points.iter().map(Point::percent).collect()),
            ] {
                assert!(axis.ticks().len() >= 2, "{axis:?}: {:?}", axis.ticks());
                assert!(values.iter().all(|v| (0.0..=1.0).contains(&axis.position(*v))), "{axis:?}: {values:?}");
            }
            let svg = svg(&points);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        assert!(Axis::for_speeds(&six()).log && !Axis::for_speeds(&six()[..2]).log);
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
    fn the_front_has_no_beaten_point() {
        assert_eq!(front(&six()), [2, 5]);
        // A point beats one that is equal in one value and worse in the other, but not an equal point.
        let points = [point("", 90, 50.0), point("", 90, 40.0), point("", 80, 50.0), point("", 90, 50.0)];
        assert_eq!(front(&points), [0, 3]);
        assert_eq!(front(&[point("", 80, 60.0), point("", 90, 50.0), point("", 70, 70.0)]), [1, 0, 2]);
    }

    #[test]
    fn names_are_text() {
        assert_eq!(escape("a<b>&\"c\"\u{7}"), "a&lt;b&gt;&amp;&quot;c&quot;\u{fffd}");
        let tags = |name: &str| svg(&[point(name, 1, 1.0)]).matches('<').count();
        assert_eq!(tags("</text><&\"]]>"), tags("harmless"));
    }

    /// Reads the areas of the labels from a picture.
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
            // Coordinates are written with one decimal.
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
        // Equal points; more labels than the minimum height holds; long names of different lengths.
        let same = |n: usize, name: &dyn Fn(usize) -> String| -> Vec<Point> {
            (0..n).map(|i| point(&name(i), 100, 80.0)).collect()
        };
        check_labels(&same(6, &|_| "cache=prefix,policy=threshold,threshold=0.9".into()));
        check_labels(&same(80, &|_| "cache=prefix,policy=threshold,threshold=0.9".into()));
        check_labels(&same(30, &|i| "prompt-interval=100,".repeat(1 + i % 9)));
        // Random points.
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
