package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/schema"
)

// remote has the flags of the verbs that ask a server.
type remote struct {
	server string
	output string // "" where the verb has no -o
}

// flags adds the flags to cmd. outputs are the formats that -o takes, its default first; none: there is no -o.
func (r *remote) flags(cmd *cobra.Command, outputs ...string) {
	cmd.Flags().StringVar(&r.server, "server", "http://127.0.0.1:8080", "URL of the server")
	if len(outputs) > 0 {
		cmd.Flags().StringVarP(&r.output, "output", "o", outputs[0], strings.Join(outputs, ", "))
		check := func(*cobra.Command, []string) error {
			if slices.Contains(outputs, r.output) {
				return nil
			}
			return fmt.Errorf("flag -o %q: want one of %s", r.output, strings.Join(outputs, ", "))
		}
		cmd.PreRunE = check
	}
}

// client speaks to the server.
func (r *remote) client() (*api.Client, error) {
	u, err := url.Parse(r.server)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("flag --server %q: want a URL as in http://127.0.0.1:8080", r.server)
	}
	return &api.Client{URL: r.server}, nil
}

// print writes v in the format of -o; table does it for people.
func (r *remote) print(cmd *cobra.Command, v any, table func(io.Writer) error) error {
	w := cmd.OutOrStdout()
	switch r.output {
	case "json":
		return writeJSON(w, v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return fmt.Errorf("writing YAML: %w", err)
		}
		_, err = w.Write(b)
		return err
	}
	return table(w)
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	return nil
}

// refused makes the server's word that a fleet has problems what vet makes of it: one line each, and exit status 1.
func refused(err error) error {
	var e *api.Error
	if errors.As(err, &e) && len(e.Problems) > 0 {
		return differs(schema.Problems(e.Problems))
	}
	return err
}
