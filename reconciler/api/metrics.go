package api

import (
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// requests counts answers by the first digit of their status.
type requests [6]atomic.Uint64

func (s *shared) count(status int) {
	if class := status / 100; class > 0 && class < len(s.requests) {
		s.requests[class].Add(1)
	}
}

// metrics serves what the records say in Prometheus' text format.
func (s *Server) metrics(w http.ResponseWriter, r *http.Request) error {
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	leases, err := state.Leases.List(r.Context(), s.Store)
	if err != nil {
		return err
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&gauges{recs: recs, leases: countLeases(leases, recs.Now), requests: &s.shared.requests, targets: s.targets()})
	gathered := prometheus.GathererFunc(just(reg.Gather())) // so that the records are not kept while the client takes its time
	promhttp.HandlerFor(gathered, promhttp.HandlerOpts{}).ServeHTTP(w, r)
	return nil
}

// just is a function that returns what it is given.
func just[T any](v T, err error) func() (T, error) { return func() (T, error) { return v, err } }

// countLeases leaves out those that are kept only for a machine that comes back.
func countLeases(leases map[string]state.Lease, now time.Time) int {
	n := 0
	for _, l := range leases {
		if l.Expires.After(now) {
			n++
		}
	}
	return n
}

// gauges collects the metrics of one scrape.
type gauges struct {
	recs     *Records
	leases   int
	requests *requests
	targets  []Target
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("troupe_"+name, help, labels, nil)
}

var (
	descConverged = desc("converged", "1 when every declared host runs, healthily, what the newest commit says.")
	descSource    = desc("source_ok", "1 when the fleet's repo can be followed and its newest commit is in force.")
	descFetched   = desc("source_fetched_timestamp_seconds", "When the fleet's repo last answered.")
	descHosts     = desc("hosts", "Hosts and unclaimed machines by state.", "state")
	descBuilds    = desc("builds", "Recipes by phase.", "kind", "phase")
	descReleases  = desc("releases", "Releases made.")
	descLeases    = desc("dhcp_leases", "Addresses of the dynamic range that are given to a machine.")
	descBootTook  = desc("host_boot_seconds", "From its first sign to healthy, of each host's last boot that got there.", "host")
	descBootBytes = desc("host_boot_fetched_bytes", "Image bytes fetched for each host's last boot.", "host")
	descLastSeen  = desc("host_last_seen_timestamp_seconds", "When each host was last heard of.", "host")
	descSessions  = desc("iscsi_sessions", "Sessions of each host with the server's iSCSI target.", "host")
	descDelta     = desc("iscsi_delta_bytes", "What each host wrote to its disk on the server takes there.", "host")
	descRequests  = desc("http_requests_total", "Answers of the API by class of status.", "class")
)

// Describe implements prometheus.Collector.
func (g *gauges) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(g, ch) }

// Collect implements prometheus.Collector.
func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	set := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	hosts, images := g.recs.Hosts(), g.recs.Images()
	st := g.recs.Status(hosts, images)
	set(descConverged, float64(btoi(st.Converged)))
	set(descSource, float64(btoi(st.FetchError == "" && st.Applied != nil && st.Attempted == nil)))
	if !st.Fetched.IsZero() {
		set(descFetched, float64(st.Fetched.UnixMilli())/1000)
	}
	for _, state := range hostStates {
		set(descHosts, float64(st.Hosts.ByState[state]), string(state))
	}
	for key, n := range countPhases(images) {
		set(descBuilds, float64(n), key[0], key[1])
	}
	set(descReleases, float64(len(g.recs.Releases)))
	set(descLeases, float64(g.leases))
	for _, h := range hosts {
		g.collectHost(h, set)
	}
	for _, t := range g.targets {
		set(descSessions, float64(len(t.Sessions)), t.Host)
		if len(t.LUNs) > 0 {
			set(descDelta, float64(t.LUNs[0].Delta), t.Host)
		}
	}
	for class := 1; class < len(g.requests); class++ {
		n := float64(g.requests[class].Load())
		ch <- prometheus.MustNewConstMetric(descRequests, prometheus.CounterValue, n, strconv.Itoa(class)+"xx")
	}
}

func (g *gauges) collectHost(h Host, set func(*prometheus.Desc, float64, ...string)) {
	if h.Name == "" {
		return // a MAC that came by is no label to keep
	}
	if !h.LastSeen.IsZero() {
		set(descLastSeen, float64(h.LastSeen.UnixMilli())/1000, h.Name)
	}
	b, ok := g.recs.Boots[h.MAC]
	if !ok || b.Healthy.IsZero() || h.Stage == string(agentapi.StageFailed) {
		return
	}
	set(descBootTook, bootView(b).Took.Seconds(), h.Name)
	set(descBootBytes, float64(b.Bytes), h.Name)
}

func countPhases(images []Image) map[[2]string]int {
	n := map[[2]string]int{}
	for _, kind := range []string{"base", "delta", "disk"} {
		for _, phase := range []state.BuildPhase{state.BuildQueued, state.BuildRunning, state.BuildDone, state.BuildFailed} {
			n[[2]string{kind, string(phase)}] = 0
		}
	}
	for _, i := range images {
		n[[2]string{i.Kind, string(i.Phase)}]++
	}
	return n
}
