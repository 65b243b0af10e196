package metrics

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"drc/internal/control"
)

var status = control.Status{
	Groups: []control.Group{
		{Name: "g", State: "backlog", Captured: 9, Durable: 8, Sealed: 7, Logged: 6, Committed: 5, LagSeconds: 1.5, BacklogBytes: 4096,
			Volumes: []control.Volume{{Name: "a", ResyncRemainingBytes: 12}, {Name: "b"}}},
		{Name: "h", State: "continuous"},
	},
	Buffer: control.Buffer{Rotten: 9, Mended: 5, LostShards: 3, Disks: []control.Disk{{Path: "/one", CapacityBytes: 100, UsedBytes: 40}, {Path: "/two", CapacityBytes: 200}}},
	Stores: []control.Store{{URL: "file:///s", State: "up"}, {URL: "file:///t", State: "down"}, {URL: "file:///u", State: "joining"}},
	Copies: []control.Copy{{Group: "g", Volume: "a", State: "following", Seq: 7, Time: "2026-01-31T12:00:00.5Z", LagSeconds: 2.5, BehindBytes: 8192}},
}

// gathered is what a scrape shows, a line for each value.
func gathered(t *testing.T, c *Collector) map[string]float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry() // refuses what is not as Describe says
	if err := r.Register(c); err != nil {
		t.Fatal(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		if f.GetHelp() == "" {
			t.Errorf("%s has no help", f.GetName())
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			out[f.GetName()+" "+strings.Join(labels, " ")] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return out
}

func TestMetrics_ShowWhatStatusShows(t *testing.T) {
	want := map[string]float64{
		"drc_lag_seconds group=g": 1.5, "drc_lag_seconds group=h": 0,
		"drc_backlog_bytes group=g": 4096, "drc_backlog_bytes group=h": 0,
		"drc_group_state group=g state=backlog": 1, "drc_group_state group=h state=continuous": 1,
		"drc_resync_remaining_bytes group=g volume=a": 12, "drc_resync_remaining_bytes group=g volume=b": 0,
		"drc_buffer_capacity_bytes disk=/one": 100, "drc_buffer_capacity_bytes disk=/two": 200,
		"drc_buffer_used_bytes disk=/one": 40, "drc_buffer_used_bytes disk=/two": 0,
		"drc_buffer_rotten_total outcome=found": 9, "drc_buffer_rotten_total outcome=mended": 5, "drc_buffer_rotten_total outcome=lost": 3,
		"drc_store_up store=file:///s": 1, "drc_store_up store=file:///t": 0, "drc_store_up store=file:///u": 0,
	}
	for k, v := range map[string]float64{"seq": 7, "point_timestamp_seconds": 1769860800.5, "lag_seconds": 2.5, "behind_bytes": 8192} {
		want["drc_standby_"+k+" group=g volume=a"] = v
	}
	want["drc_standby_state group=g state=following volume=a"] = 1
	for i, w := range []string{"captured", "durable", "sealed", "logged", "committed"} {
		want["drc_watermark_seq group=g watermark="+w] = float64(9 - i)
		want["drc_watermark_seq group=h watermark="+w] = 0
	}
	got := gathered(t, New(func() control.Status { return status }))
	for k, v := range want {
		if g, ok := got[k]; !ok || g != v {
			t.Errorf("%s is %v (there: %v), not %v", k, g, ok, v)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d values, not %d: %v", len(got), len(want), got)
	}
}

// Each scrape asks anew.
func TestMetrics_AreOfTheMomentOfTheScrape(t *testing.T) {
	now := control.Status{}
	c := New(func() control.Status { return now })
	if got := gathered(t, c); len(got) != 0 {
		t.Errorf("an agent without groups, disks and stores shows %v", got)
	}
	now = status
	if got := gathered(t, c); got["drc_lag_seconds group=g"] != 1.5 {
		t.Errorf("the second scrape shows %v", got)
	}
}

var metricRow = regexp.MustCompile("(?m)^\\| `(drc_[a-z_]+)` \\| ([a-z, ]+) \\|")

// What is shown is what the document promises, and the other way round.
func TestMetrics_AreAsDocumented(t *testing.T) {
	raw, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for _, m := range metricRow.FindAllStringSubmatch(string(raw), -1) {
		documented[m[1]] = m[2]
	}
	shown := map[string]string{}
	for line := range gathered(t, New(func() control.Status { return status })) {
		name, labels, _ := strings.Cut(line, " ")
		var names []string
		for _, l := range strings.Fields(labels) {
			n, _, _ := strings.Cut(l, "=")
			names = append(names, n)
		}
		shown[name] = strings.Join(names, ", ")
	}
	if a, b := fmt.Sprint(shown), fmt.Sprint(documented); a != b {
		t.Errorf("shown:      %s\ndocumented: %s", a, b)
	}
}
