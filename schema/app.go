package schema

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// An App is what a role does with an app image.
type App struct {
	Name  string            `json:"name"`
	Image string            `json:"image"`           // names an Image of kind "app"; default Name
	Mount string            `json:"mount"`           // where it is mounted; default /opt/<Name>
	Exec  []string          `json:"exec,omitempty"`  // of its service; none: it is only mounted
	Env   map[string]string `json:"env,omitempty"`   // of its service
	User  string            `json:"user,omitempty"`  // of its service; default root
	Root  bool              `json:"root,omitempty"`  // its service sees the image as its root file system
	Data  string            `json:"data"`            // "keep" or "fresh"; default keep
	Delta string            `json:"delta,omitempty"` // "keep", "fresh", or "": nothing can be written where it is mounted
}

// What becomes of an app's data directory and of its delta.
const (
	Keep  = "keep"
	Fresh = "fresh"
)

// Apps are those of a role, sorted by name.
type Apps []App

// UnmarshalJSON reads a list of names, a list of Apps, or Apps by name, and fills in what they leave out.
func (a *Apps) UnmarshalJSON(b []byte) error {
	*a = nil
	if b = bytes.TrimSpace(b); len(b) == 0 || b[0] == 'n' {
		return nil
	}
	if b[0] == '{' {
		var byName map[string]App
		if err := json.Unmarshal(b, &byName); err != nil {
			return err
		}
		for name, app := range byName {
			app.Name = name
			*a = append(*a, app)
		}
	} else {
		var list []json.RawMessage
		if err := json.Unmarshal(b, &list); err != nil {
			return err
		}
		for i, raw := range list {
			var app App
			target := any(&app)
			if raw[0] == '"' {
				target = &app.Name
			}
			if err := json.Unmarshal(raw, target); err != nil {
				return fmt.Errorf("app %d: %w", i, err)
			}
			*a = append(*a, app)
		}
	}
	return a.finish()
}

// finish fills in defaults and sorts.
func (a Apps) finish() error {
	for i := range a {
		app := &a[i]
		if app.Name == "" {
			return errors.New("an app has no name")
		}
		app.Image = cmp.Or(app.Image, app.Name)
		app.Mount = cmp.Or(app.Mount, "/opt/"+app.Name)
		app.Data = cmp.Or(app.Data, Keep)
		if app.Root { // what a service needs in its root, such as /proc, is mounted into directories that are made for it
			app.Delta = cmp.Or(app.Delta, Fresh)
		}
	}
	slices.SortFunc(a, func(x, y App) int { return cmp.Compare(x.Name, y.Name) })
	return nil
}
