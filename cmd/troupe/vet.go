package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/schema"
	"github.com/troupe-dev/troupe/schema/load"
)

// A vetResult is what `troupe vet -o json` prints.
type vetResult struct {
	Valid    bool            `json:"valid"`
	Hosts    int             `json:"hosts"`
	Roles    int             `json:"roles"`
	Images   int             `json:"images"`
	Problems schema.Problems `json:"problems"` // never null
}

func newVetCommand() *cobra.Command {
	var output string
	var memory int64
	loader := &load.Loader{}
	cmd := &cobra.Command{
		Use:   "vet [DIR]",
		Short: "Check the fleet in a directory",
		Long: `vet checks the fleet whose root is DIR (default: the working directory), as the
server checks a commit, and prints all that is wrong with it to standard error:
one line for each problem, "file:line:col: what is wrong".

Exit status: 0 the fleet is valid; 1 it is not; 2 the directory could not be read.`,
		Example: "  troupe vet\n  troupe vet ./fleet -o json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir := "."
			if len(args) > 0 {
				dir = args[0]
			}
			if output != "text" && output != "json" {
				return fmt.Errorf("flag -o %q: want text or json", output)
			}
			loader.Memory = memory << 20
			return vet(cmd, loader, dir, output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	cmd.Flags().DurationVar(&loader.Deadline, "eval-deadline", load.DefaultDeadline, "how long the evaluation may take")
	cmd.Flags().Int64Var(&memory, "eval-memory", load.DefaultMemory>>20, "how much memory the evaluation may take, in MiB")
	return cmd
}

// vet loads the fleet in dir and says what came of it.
func vet(cmd *cobra.Command, loader *load.Loader, dir, output string) error {
	if info, err := os.Stat(dir); err != nil {
		return fmt.Errorf("reading the fleet: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("reading the fleet: %q is not a directory", dir)
	}
	fleet, err := loader.Load(cmd.Context(), os.DirFS(dir))
	var problems schema.Problems
	if err != nil && !errors.As(err, &problems) {
		return err
	}
	if output == "json" {
		return vetJSON(cmd, fleet, problems)
	}
	if err != nil {
		return differs(problems)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "valid: %s, %s, %s\n",
		count(len(fleet.Hosts), "host"), count(len(fleet.Roles), "role"), count(len(fleet.Images), "image"))
	return err
}

func vetJSON(cmd *cobra.Command, fleet *schema.Fleet, problems schema.Problems) error {
	res := vetResult{Valid: fleet != nil, Problems: schema.Problems{}}
	if fleet != nil {
		res.Hosts, res.Roles, res.Images = len(fleet.Hosts), len(fleet.Roles), len(fleet.Images)
	} else {
		res.Problems = problems
	}
	enc := json.NewEncoder(cmd.OutOrStdout())
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(res); err != nil {
		return fmt.Errorf("writing the result: %w", err)
	}
	if !res.Valid {
		return differs(nil)
	}
	return nil
}

// count is "1 host", "2 hosts".
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
