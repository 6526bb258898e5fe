package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

type eventOptions struct {
	remote
	follow  bool
	subject string
	since   time.Duration
	limit   int
}

func newEventsCommand() *cobra.Command {
	var o eventOptions
	cmd := &cobra.Command{
		Use:   "events",
		Short: "List what happened",
		Long: `Lists the last events, the newest last. A line with ! wants somebody to look.
With --follow, -o json prints one event a line.`,
		Example: `  troupe events
  troupe events --follow --subject n1
  troupe events --since 1h -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.client()
			if err != nil {
				return err
			}
			if o.follow {
				return o.goOn(cmd, c)
			}
			return o.once(cmd, c)
		},
	}
	o.flags(cmd, "table", "json", "yaml")
	cmd.Flags().BoolVarP(&o.follow, "follow", "f", false, "go on with what happens, until interrupted")
	cmd.Flags().StringVar(&o.subject, "subject", "", "only what is about this host, MAC, commit or image")
	cmd.Flags().DurationVar(&o.since, "since", 0, "only what happened in this time until now, as in 1h30m")
	cmd.Flags().IntVar(&o.limit, "limit", 100, "how many at most, the newest")
	return cmd
}

func (o *eventOptions) once(cmd *cobra.Command, c *api.Client) error {
	q := api.EventQuery{Subject: o.subject, Limit: o.limit}
	if o.since > 0 {
		q.Since = time.Now().Add(-o.since)
	}
	events, err := c.Events(cmd.Context(), q)
	if err != nil {
		return err
	}
	return o.print(cmd, events, func(w io.Writer) error {
		t := table{header: []string{"TIME", "", "KIND", "SUBJECT", "MESSAGE"}}
		for _, e := range events {
			t.add(e.Time.Local().Format(time.DateTime), mark(e), e.Kind, cut(e.Subject, 40), e.Message)
		}
		return t.write(w, "no events")
	})
}

func mark(e state.Event) string {
	if e.Warning {
		return "!"
	}
	return ""
}

// goOn prints events as they come.
func (o *eventOptions) goOn(cmd *cobra.Command, c *api.Client) error {
	w := cmd.OutOrStdout()
	told := map[state.Event]bool{}
	var failed error
	err := c.Follow(cmd.Context(), func(s *api.Snapshot) bool {
		now := make(map[state.Event]bool, len(s.Events))
		for _, e := range slices.Backward(s.Events) { // the newest is the first of them
			now[e] = true
			if !told[e] && failed == nil && o.wants(e) {
				failed = o.line(w, e)
			}
		}
		told = now
		return failed != nil
	})
	if cmd.Context().Err() != nil {
		return nil //nolint:nilerr // interrupted: that is how it ends
	}
	if failed != nil {
		return failed
	}
	return err
}

func (o *eventOptions) wants(e state.Event) bool {
	return (o.subject == "" || e.Subject == o.subject) && (o.since <= 0 || time.Since(e.Time) < o.since)
}

// line prints one event without knowing those after it: its columns have fixed widths.
func (o *eventOptions) line(w io.Writer, e state.Event) error {
	if o.output == "json" {
		return json.NewEncoder(w).Encode(e)
	}
	_, err := fmt.Fprintf(w, "%s %1s %-10s %-12s %s\n", e.Time.Local().Format(time.DateTime), mark(e), plain(e.Kind), plain(cut(e.Subject, 40)), plain(e.Message))
	return err
}
