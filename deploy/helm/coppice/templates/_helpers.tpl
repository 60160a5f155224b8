{{/* Name of everything: the release, and the chart unless the release is called so. */}}
{{- define "coppice.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "coppice.headless" -}}{{ include "coppice.fullname" . }}-replicas{{- end }}
{{- define "coppice.router" -}}{{ include "coppice.fullname" . }}-router{{- end }}

{{- define "coppice.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s%s" .Chart.AppVersion .Values.image.tagSuffix) }}
{{- end }}

{{/* Labels that select: (dict "root" $ "component" "replica"). */}}
{{- define "coppice.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "coppice.labels" -}}
{{ include "coppice.selector" . }}
app.kubernetes.io/part-of: coppice
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* SIGTERM comes after propagationSeconds; timeoutSeconds later open calls end; the step that runs gets 5 s more, the rest is slack. */}}
{{- define "coppice.gracePeriod" -}}
{{ add .Values.drain.propagationSeconds .Values.drain.timeoutSeconds 15 }}
{{- end }}

{{- define "coppice.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "coppice.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Fields that every pod of ours shares. */}}
{{- define "coppice.podCommon" -}}
serviceAccountName: {{ include "coppice.fullname" .root }}
automountServiceAccountToken: false
enableServiceLinks: false  # they would set COPPICE_PORT
terminationGracePeriodSeconds: {{ include "coppice.gracePeriod" .root }}
securityContext: {{- include "coppice.podSecurityContext" .root | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $field := list "priorityClassName" "runtimeClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $.values $field }}
{{ $field }}: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Flags that both roles take, then the operator's own. YAML's numbers arrive as floats: 2048000 must not become 2.048e+06. */}}
{{- define "coppice.commonArgs" -}}
- --host=0.0.0.0
- --port=7700
- --http_port=7701
- --drain_timeout_s={{ .root.Values.drain.timeoutSeconds }}
{{- if .root.Values.trustTenantHeader }}
- --trust_tenant_header
{{- end }}
{{- range $name, $value := .values.flags }}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value = int64 $value }}{{ end }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}

{{/* Readiness is gRPC's health (false while loading, paused, draining); liveness is the process, never its load. */}}
{{- define "coppice.containerCommon" -}}
ports:
  - {name: grpc, containerPort: 7700}
  - {name: http, containerPort: 7701}
readinessProbe:
  grpc: {port: 7700}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
lifecycle:
  preStop:
    sleep: {seconds: {{ .root.Values.drain.propagationSeconds }}}
securityContext: {{- include "coppice.securityContext" .root | nindent 2 }}
{{- end }}
