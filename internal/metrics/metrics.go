// Package metrics shows an agent's status to Prometheus. It reads the same
// snapshot as drc status, at the moment it is scraped.
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"drc/internal/control"
)

// Collector makes metrics from status.
type Collector struct {
	status func() control.Status

	watermark, lag, backlog, state, resync, capacity, used, rotten, store *prometheus.Desc

	copySeq, copyTime, copyLag, copyBehind, copyState *prometheus.Desc
}

// New returns a Collector that asks status at each scrape.
func New(status func() control.Status) *Collector {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("drc_"+name, help, labels, nil)
	}
	return &Collector{
		status:    status,
		watermark: d("watermark_seq", "Position of a watermark on the group's history.", "group", "watermark"),
		lag:       d("lag_seconds", "Age of the oldest write that is not committed.", "group"),
		backlog:   d("backlog_bytes", "Bytes of writes that are not committed.", "group"),
		state:     d("group_state", "1 for the state that the group is in.", "group", "state"),
		resync:    d("resync_remaining_bytes", "Bytes of a volume that a resync has still to read.", "group", "volume"),
		capacity:  d("buffer_capacity_bytes", "Capacity of a buffer directory.", "disk"),
		used:      d("buffer_used_bytes", "Use of a buffer directory.", "disk"),
		rotten:    d("buffer_rotten_total", "Copies of shards and records in the buffer that were found rotten, by what became of them.", "outcome"),
		store:     d("store_up", "1 while the store is up.", "store"),

		copySeq:    d("standby_seq", "Position on the group's history that the standby's copy of a volume has reached.", "group", "volume"),
		copyTime:   d("standby_point_timestamp_seconds", "Time of the checkpoint that the standby's copy of a volume has reached.", "group", "volume"),
		copyLag:    d("standby_lag_seconds", "Age of the oldest checkpoint that the standby's copy of a volume should be at and is not.", "group", "volume"),
		copyBehind: d("standby_behind_bytes", "Bytes that are to be fetched for the standby's copy of a volume, as last counted.", "group", "volume"),
		copyState:  d("standby_state", "1 for the state that the standby's copy of a volume is in.", "group", "volume", "state"),
	}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.watermark, c.lag, c.backlog, c.state, c.resync, c.capacity, c.used, c.rotten, c.store,
		c.copySeq, c.copyTime, c.copyLag, c.copyBehind, c.copyState} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s := c.status()
	for _, g := range s.Groups {
		gauge(c.watermark, float64(g.Captured), g.Name, "captured")
		gauge(c.watermark, float64(g.Durable), g.Name, "durable")
		gauge(c.watermark, float64(g.Sealed), g.Name, "sealed")
		gauge(c.watermark, float64(g.Logged), g.Name, "logged")
		gauge(c.watermark, float64(g.Committed), g.Name, "committed")
		gauge(c.lag, g.LagSeconds, g.Name)
		gauge(c.backlog, float64(g.BacklogBytes), g.Name)
		gauge(c.state, 1, g.Name, g.State)
		for _, v := range g.Volumes {
			gauge(c.resync, float64(v.ResyncRemainingBytes), g.Name, v.Name)
		}
	}
	for _, d := range s.Buffer.Disks {
		gauge(c.capacity, float64(d.CapacityBytes), d.Path)
		gauge(c.used, float64(d.UsedBytes), d.Path)
	}
	if len(s.Buffer.Disks) > 0 {
		for outcome, n := range map[string]int64{"found": s.Buffer.Rotten, "mended": s.Buffer.Mended, "lost": s.Buffer.LostShards} {
			ch <- prometheus.MustNewConstMetric(c.rotten, prometheus.CounterValue, float64(n), outcome)
		}
	}
	for _, st := range s.Stores {
		up := 0.0
		if st.State == "up" {
			up = 1
		}
		gauge(c.store, up, st.URL)
	}
	for _, x := range s.Copies {
		gauge(c.copySeq, float64(x.Seq), x.Group, x.Volume)
		if t, err := time.Parse(time.RFC3339Nano, x.Time); err == nil {
			gauge(c.copyTime, float64(t.UnixNano())/1e9, x.Group, x.Volume)
		}
		gauge(c.copyLag, x.LagSeconds, x.Group, x.Volume)
		gauge(c.copyBehind, float64(x.BehindBytes), x.Group, x.Volume)
		gauge(c.copyState, 1, x.Group, x.Volume, x.State)
	}
}
